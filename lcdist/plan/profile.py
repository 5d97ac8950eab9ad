"""Read and check the settings of the profiler: which steps, on which rank."""

import re

from lcdist.config.schema import Config

NO_STEPS = range(0)


def profiled_steps(value: str | int) -> range | None:
    """Return the steps that `train.profile` names, counted from 1; none if it is empty.

    Returns None unless the value is a step or a range of increasing steps from 1.
    """
    text = str(value).strip()
    if not text:
        return NO_STEPS
    match = re.fullmatch(r"([0-9]{1,12})(?:-([0-9]{1,12}))?", text)
    if match is None:
        return None
    first, last = int(match[1]), int(match[2] or match[1])
    return range(first, last + 1) if 1 <= first <= last else None


def check_profile(config: Config, world_size: int, errors: list[str]) -> None:
    """Check that the profiled steps and the profiled rank exist."""
    train = config.train
    steps, rank = profiled_steps(train.profile), train.profile_rank
    legal = "1" if train.steps == 1 else f"1 to {train.steps}"
    if steps is None:
        errors.append(
            f"train.profile = {train.profile!r}: must be a step or a range of increasing steps, "
            f"such as '5' or '5-7', from {legal}; leave it empty to profile none"
        )
    elif steps and steps[-1] > train.steps:
        errors.append(
            f"train.profile = {train.profile!r} is beyond train.steps = {train.steps}; choose "
            f"from {legal}, or raise train.steps"
        )
    if rank and steps == NO_STEPS:
        errors.append(
            f"train.profile_rank = {rank} has no meaning with train.profile = ''; set the steps "
            "to profile, or leave the key out"
        )
    elif rank >= max(1, world_size):
        legal = "0" if world_size == 1 else f"0 to {world_size - 1}"
        errors.append(
            f"train.profile_rank = {rank}: a world of size {world_size} has no such rank; choose "
            f"from {legal}"
        )
