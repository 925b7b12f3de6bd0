"""Whether records that are already there are of the data at hand, by the digests that they keep of theirs."""

from collections.abc import Mapping

import torch

from pyro_lvm._checks import refuse
from pyro_lvm.errors import CheckpointError
from pyro_lvm.evidence.record import LogMarginal
from pyro_lvm.tracing.batch import Rows
from pyro_lvm.tracing.digest import DataDigest, digest_of

__all__ = ["check_same_data"]


def check_same_data(records: Mapping[str, LogMarginal], source: Rows) -> None:
    """Each is of these data, in single, double or their own precision, with all further arguments or the first ones.

    Records without a digest pass, and data that are drawn anew at each reading, which no two estimates have alike.

    Raises:
        CheckpointError: one is of other data.
    """
    digests = {name: record.provenance.get("sha256", {}).get("data") for name, record in records.items()}
    others, same = [name for name, digest in digests.items() if digest], set()
    for dtype in (None, torch.float32, torch.float64):
        if others:
            same |= _with_arguments(digest_of(source, dtype))
            others = [name for name in others if digests[name] not in same]
    if others and digest_of(source).chains == digest_of(source, seed=1).chains:
        cure = "Estimate it on the same x, in the same order, and arguments; differences are paired datum by datum."
        got = "one of other data: the SHA-256 that it keeps is another"
        raise CheckpointError(refuse(", ".join(others), "an estimate on the data of this call", got, cure))


def _with_arguments(digest: DataDigest) -> set[str]:
    """That of x alone, and those of x with one further argument after the other."""
    found, part = set(), DataDigest()
    for count in range(1, len(digest.chains) + 1):
        part.chains = digest.chains[:count]
        found.add(part.hexdigest())
    return found
