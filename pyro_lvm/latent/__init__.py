"""The latent space of any pair: where data lie in it, what its points look like, paths through it, clusters.

`encode` and `attribute` go from x to z, weighted to the posterior, and `cluster` sorts data by a discrete latent;
`decode`, `reconstruct` and `sample` run the model forwards; `interpolate`, `traverse` and `attribute_vector` make
points to decode.
"""

from pyro_lvm.latent.clusters import Clustering, ClusterScores, cluster, cluster_scores
from pyro_lvm.latent.forward import decode, reconstruct, sample
from pyro_lvm.latent.paths import attribute_vector, interpolate, traverse
from pyro_lvm.latent.posterior import attribute, encode

__all__ = [
    "ClusterScores",
    "Clustering",
    "attribute",
    "attribute_vector",
    "cluster",
    "cluster_scores",
    "decode",
    "encode",
    "interpolate",
    "reconstruct",
    "sample",
    "traverse",
]
