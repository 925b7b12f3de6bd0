import gzip
import struct
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from pyro_lvm import datasets
from pyro_lvm.errors import DatasetError, DataTypeError, ShapeError

IMAGES = torch.arange(5 * 4 * 3, dtype=torch.uint8).reshape(5, 4, 3) * 4  # grey levels 0, 4, ..., 236


def idx_bytes(values):
    sizes = struct.pack(f">{values.dim()}I", *values.shape)
    return bytes([0, 0, 8, values.dim()]) + sizes + bytes(values.flatten().tolist())


def write_idx(root, name="MNIST", compress=False, **replace):
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    contents = {
        "train-images-idx3-ubyte": idx_bytes(IMAGES),
        "train-labels-idx1-ubyte": idx_bytes(torch.arange(5)),
        "t10k-images-idx3-ubyte": idx_bytes(IMAGES[:2]),
        "t10k-labels-idx1-ubyte": idx_bytes(torch.arange(2)),
    } | replace
    for part, content in contents.items():
        path = folder / (part + ".gz" if compress else part)
        path.write_bytes(gzip.compress(content) if compress else content)
    return root


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PYRO_LVM_DATA", raising=False)


def test_digits_split_every_image_once():
    from sklearn.datasets import load_digits

    data = datasets.digits("counts")
    assert (len(data.train), len(data.test)) == (1437, 360)
    both = torch.cat([data.train, data.test])
    original = torch.from_numpy(load_digits().data).float()
    assert torch.equal(both.unique(dim=0), original.unique(dim=0))
    assert torch.equal(both.sum(0), original.sum(0))
    assert (
        torch.cat([data.train_labels, data.test_labels])
        .bincount()
        .equal(torch.from_numpy(load_digits().target).bincount())
    )


def test_digits_binarisations_agree():
    counts, grey = datasets.digits("counts"), datasets.digits("none")
    assert torch.equal(counts.train, counts.train.round())
    assert counts.train.max() == 16
    assert torch.equal(grey.train * 16, counts.train)
    assert torch.equal(datasets.digits("threshold").test, (counts.test > 8).float())
    assert torch.equal(datasets.digits("dynamic").train, grey.train)
    assert counts.image_shape == (8, 8)
    assert counts.train.dtype == torch.float32


def test_digits_seed_decides_the_split():
    assert torch.equal(datasets.digits(seed=3).train, datasets.digits(seed=3).train)
    assert not torch.equal(datasets.digits(seed=3).train, datasets.digits(seed=4).train)


def test_digits_can_all_be_training_data():
    data = datasets.digits(split=(1797, 0))
    assert (data.train.shape, data.test.shape) == ((1797, 64), (0, 64))


def test_provenance_names_the_binarisation():
    expected = {"name": "digits", "binarize": "dynamic", "num_train": 10, "num_test": 4, "image_shape": (8, 8)}
    assert datasets.digits("dynamic", split=(10, 4), seed=2).provenance == expected | {"seed": 2}


def test_dynamic_test_images_are_one_fixed_draw():
    first, again = datasets.digits("dynamic"), datasets.digits("dynamic")
    assert torch.equal(first.test, again.test)
    assert set(first.test.unique().tolist()) == {0.0, 1.0}
    grey = datasets.digits("none").test
    assert torch.equal(first.test[grey == 0], grey[grey == 0])
    error = (first.test - grey).mean() / ((grey * (1 - grey)).sum().sqrt() / grey.numel())
    assert abs(error) < 5  # standard errors of a mean of independent Bernoulli pixels


def test_dynamic_training_images_are_drawn_anew():
    data = datasets.digits("dynamic", split=(64, 10))

    def epoch(seed):
        torch.manual_seed(seed)
        return torch.cat(list(DataLoader(data.train_dataset, batch_size=10, shuffle=True)))

    assert epoch(0).shape == (64, 64)
    assert set(epoch(0).unique().tolist()) == {0.0, 1.0}
    assert torch.equal(epoch(0), epoch(0))
    dataset = data.train_dataset
    assert not torch.equal(dataset[:], dataset[:])
    assert dataset[0].shape == (64,)


def test_fixed_training_images_come_as_they_are():
    data = datasets.digits("none", split=(64, 10))
    assert torch.equal(torch.stack(list(DataLoader(data.train_dataset, batch_size=None))), data.train)


def test_faces_split_every_face_once():
    original = pytest.importorskip("skimage.data").lfw_subset()
    data = datasets.faces()
    assert (data.train.shape, data.test.shape, data.image_shape) == ((85, 625), (15, 625), (25, 25))
    both = torch.cat([data.train, data.test])
    expected = torch.from_numpy(original[:100]).float().flatten(1)  # the other hundred are no faces
    assert torch.equal(both.unique(dim=0), expected.unique(dim=0))
    assert both.dtype == torch.float32
    assert (both.min(), both.max()) == (0.0, 1.0)
    assert torch.equal(torch.cat([data.train_labels, data.test_labels]), torch.zeros(100, dtype=torch.long))
    expected = {"name": "faces", "binarize": "none", "num_train": 85, "num_test": 15, "image_shape": (25, 25)}
    assert data.provenance == expected | {"seed": 0}
    assert data.train.provenance == data.provenance


def test_faces_seed_decides_the_split():
    pytest.importorskip("skimage")
    assert torch.equal(datasets.faces(seed=3).test, datasets.faces(seed=3).test)
    assert not torch.equal(datasets.faces(seed=3).test, datasets.faces(seed=4).test)
    with pytest.raises(ShapeError, match="split: expected 100 images at most"):
        datasets.faces(split=(90, 11))


def test_missing_scikit_image_is_a_dataset_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(DatasetError, match=r'faces: expected scikit-image.*pip install "pyro_lvm\[data\]"'):
        datasets.faces()


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(("load", "name"), [(datasets.mnist, "MNIST"), (datasets.fashion_mnist, "FashionMNIST")])
def test_idx_files_are_read(tmp_path, load, name, compress):
    data = load("none", root=write_idx(tmp_path, name, compress))
    torch.testing.assert_close(data.train, IMAGES.flatten(1).float() / 255)
    torch.testing.assert_close(data.test, IMAGES[:2].flatten(1).float() / 255)
    assert data.train_labels.equal(torch.arange(5))
    assert data.image_shape == (4, 3)
    assert data.name == name


def test_idx_threshold_is_half(tmp_path):
    data = datasets.mnist(root=write_idx(tmp_path))
    assert torch.equal(data.train, (IMAGES.flatten(1) > 127.5).float())


def test_places_are_searched_in_order(tmp_path, monkeypatch):
    write_idx(tmp_path / "home" / ".cache" / "pyro_lvm")
    assert len(datasets.mnist().train) == 5
    short = {"train-images-idx3-ubyte": idx_bytes(IMAGES[:3]), "train-labels-idx1-ubyte": idx_bytes(torch.arange(3))}
    monkeypatch.setenv("PYRO_LVM_DATA", str(write_idx(tmp_path / "variable", **short)))
    assert len(datasets.mnist().train) == 3
    assert len(datasets.mnist(root=write_idx(tmp_path / "root")).train) == 5


def test_missing_data_names_every_place_and_the_cure(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_LVM_DATA", str(tmp_path / "variable"))
    with pytest.raises(DatasetError) as caught:
        datasets.mnist(root=tmp_path / "mine")
    message = str(caught.value)
    places = [tmp_path / "mine", tmp_path / "variable", tmp_path / "home" / ".cache" / "pyro_lvm"]
    for part in [*map(str, places), "MNIST/raw", "train-images-idx3-ubyte", "root=", "$PYRO_LVM_DATA", "download=True"]:
        assert part in message


def test_missing_variable_is_said(tmp_path):
    with pytest.raises(DatasetError, match=r"root \(not given\), \$PYRO_LVM_DATA \(not given\)"):
        datasets.mnist()


DAMAGED = [
    (idx_bytes(IMAGES)[:-7], "76 bytes", "69 bytes"),  # 16 bytes of header + 5 * 4 * 3
    (idx_bytes(IMAGES) + b"\0", "76 bytes", "77 bytes"),
    (idx_bytes(IMAGES[0]), "00 00 08 03", "00 00 08 02"),
    (b"\0\0", "16 bytes", "2 bytes"),
]


@pytest.mark.parametrize(("content", "expected", "found"), DAMAGED)
def test_damaged_file_is_named_with_its_sizes(tmp_path, content, expected, found):
    root = write_idx(tmp_path, **{"train-images-idx3-ubyte": content})
    with pytest.raises(DatasetError) as caught:
        datasets.mnist(root=root)
    for part in ("train-images-idx3-ubyte", expected, found, "delete it"):
        assert part in str(caught.value)


def test_truncated_gzip_is_named(tmp_path):
    root = write_idx(tmp_path, compress=True)
    path = root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DatasetError, match=r"t10k-labels-idx1-ubyte\.gz.*readable"):
        datasets.mnist(root=root)


def test_labels_of_other_images_are_refused(tmp_path):
    root = write_idx(tmp_path, **{"train-labels-idx1-ubyte": idx_bytes(torch.arange(4))})
    with pytest.raises(DatasetError, match="train-labels-idx1-ubyte: expected 5 labels.*got 4"):
        datasets.mnist(root=root)


def test_download_goes_through_torchvision_to_root(tmp_path, monkeypatch):
    def fetch(root, train, download):
        assert train
        assert download
        write_idx(root)

    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=SimpleNamespace(MNIST=fetch)))
    assert len(datasets.mnist(root=tmp_path / "new", download=True).train) == 5


@pytest.mark.parametrize("error", [RuntimeError("no mirror"), OSError("no network")])
def test_failed_download_is_a_dataset_error(tmp_path, monkeypatch, error):
    def fetch(root, train, download):
        raise error

    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=SimpleNamespace(MNIST=fetch)))
    with pytest.raises(DatasetError, match=str(error)):
        datasets.mnist(root=tmp_path, download=True)


def test_missing_torchvision_is_a_dataset_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DatasetError, match="by hand"):
        datasets.mnist(root=tmp_path, download=True)


def test_unknown_binarisation_lists_the_names(tmp_path):
    with pytest.raises(DataTypeError, match="'counts'.*got 'Threshold'"):
        datasets.digits("Threshold")
    with pytest.raises(DataTypeError, match="got 'counts'"):
        datasets.mnist("counts", root=write_idx(tmp_path))


def test_too_large_split_is_refused():
    with pytest.raises(ShapeError, match="split: expected 1797"):
        datasets.digits(split=(1500, 400))


@pytest.mark.parametrize("make", [datasets.two_moons, datasets.pinwheel, datasets.gaussian_blobs])
def test_toys_are_seeded_and_balanced(make):
    x, labels = make(300, seed=1)
    assert x.shape == (300, 2)
    assert x.dtype == torch.float32
    assert len(labels.bincount().unique()) == 1
    assert torch.equal(x, make(300, seed=1)[0])
    assert not torch.equal(x, make(300, seed=2)[0])


def test_two_moons_without_noise_lie_on_their_circles():
    x, labels = datasets.two_moons(200, noise=0.0)
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.5]])[labels]
    torch.testing.assert_close((x - centres).norm(dim=-1), torch.ones(200))
    assert (x[labels == 0, 1] >= 0).all()
    assert (x[labels == 1, 1] <= 0.5).all()


def test_pinwheel_arms_are_rotations_of_one():
    x, labels = datasets.pinwheel(4000, num_arms=4)
    means = torch.stack([x[labels == arm].mean(0) for arm in range(4)])
    turned = means[:-1] @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])  # by a quarter
    torch.testing.assert_close(turned, means[1:], atol=5 * (2 / 1000) ** 0.5 * 0.3, rtol=0)  # 5 stderr


def test_blobs_without_scale_are_their_means():
    x, labels = datasets.gaussian_blobs(8, num_components=4, scale=0.0)
    means = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0], [0.0, -2.0]])
    torch.testing.assert_close(x, means[labels], atol=1e-6, rtol=1e-6)
