"""Results on digits that the README quotes, over several seeds: minutes of training, so marked `long`."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from examples import cluster_digits, semi_supervised_digits
from pyro_lvm.datasets import digits
from pyro_lvm.latent import cluster_scores

SEEDS = range(5)

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_digits_are_sorted_without_labels():
    """Better than a full-covariance mixture on 20 principal components, which has .835 / .738."""
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32)
    scores = []
    for seed in SEEDS:
        model, q, _ = cluster_digits.train(x, seed, epochs=(250, 80))
        scores.append(cluster_scores(model.component_probs(q, seed=seed).argmax(1), data.target))
    accuracy, rand_index = np.mean([(found.accuracy, found.ari) for found in scores], axis=0)
    assert accuracy >= 0.84
    assert rand_index >= 0.77


def test_a_hundred_labels_are_enough():
    """Support vector machines on the labelled images alone have .928 here."""
    data = digits("counts")
    accuracies = []
    for seed in SEEDS:
        y = semi_supervised_digits.some_labels(data.train_labels, seed)
        model, q = semi_supervised_digits.train(data.train, y, data.test, seed, epochs=(100, 60))
        accuracies.append((model.class_probs(q, seed=seed).argmax(1) == data.test_labels).double().mean())
    assert np.mean(accuracies) >= 0.95
