"""A step's numbers whose maximum over all ranks is recorded, as integers for one message."""

from collections.abc import Mapping

from lcdist.distributed.mesh import Mesh
from lcdist.hardware.peak import peak_memory
from lcdist.rundir.records import RankTimes

# Radix that packs a time and a rank number into one integer: more than any number of ranks.
RANK_RADIX = 2**20
VERBS = ("ring", "shift", "gather", "swap")


def own_maxima(mesh: Mesh, sent: Mapping[str, int], own_work: float) -> dict[str, int]:
    """Return this rank's numbers.

    Args:
        mesh: this rank's place and device.
        sent: bytes sent by exchange verb.
        own_work: seconds this rank worked without waiting for others.

    Returns:
        "memory" and each verb in bytes. "slowest" is microseconds * RANK_RADIX + the rank,
        "fastest" microseconds, negated.
    """
    micros = max(0, round(own_work * 1e6))
    own = {"slowest": micros * RANK_RADIX + mesh.rank, "fastest": -micros}
    own["memory"] = peak_memory(mesh.device)
    return own | {verb: sent.get(verb, 0) for verb in VERBS}


def rank_times(maxima: Mapping[str, int]) -> RankTimes:
    """Return the times of the fastest and the slowest rank from the maxima over all ranks."""
    return RankTimes(
        least=-maxima["fastest"] / 1e6,
        most=maxima["slowest"] // RANK_RADIX / 1e6,
        slowest=maxima["slowest"] % RANK_RADIX,
    )
