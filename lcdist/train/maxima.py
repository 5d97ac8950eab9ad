"""A step's numbers whose maximum over all ranks is recorded, as integers for one message."""

import math
import time
from collections.abc import Mapping

from lcdist.distributed.mesh import Mesh
from lcdist.engines.engine import PendingLoss
from lcdist.hardware.peak import Peak, mfu, peak_memory
from lcdist.plan import Plan
from lcdist.rundir.records import RankTimes, StepRecord, StepTime

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


def step_record(  # noqa: PLR0913
    plan: Plan,
    peak: Peak,
    step: int,
    samples: int,
    loss: PendingLoss,
    grad_norm: float | None,
    lr: float,
    maxima: Mapping[str, int],
    spent: StepTime,
) -> StepRecord:
    """Return the record of a step.

    Args:
        plan, peak: of the run.
        step, samples: taken since the run began.
        loss: of the step.
        grad_norm: before clipping; None for a step that was skipped.
        lr: learning rate.
        maxima: of `own_maxima` over all ranks.
        spent: seconds on this rank.
    """
    rate = loss.tokens / spent.step
    return StepRecord(
        step=step,
        samples=samples,
        tokens=loss.tokens,
        loss=loss.mean,
        grad_norm=math.nan if grad_norm is None else grad_norm,
        lr=lr,
        tokens_per_second=rate,
        mfu_full=mfu(plan.compute.flops_per_token_square, rate, peak, plan.world_size),
        mfu_causal=mfu(plan.compute.flops_per_token, rate, peak, plan.world_size),
        memory_bytes=maxima["memory"],
        exchange_bytes={verb: maxima[verb] for verb in VERBS if maxima[verb]},
        time=spent,
        wall=time.time(),
        ranks=rank_times(maxima),
        skipped=grad_norm is None,
    )
