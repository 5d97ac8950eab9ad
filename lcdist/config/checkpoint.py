"""Configuration of checkpoints."""

from dataclasses import dataclass
from typing import Literal

from lcdist.config.fields import CHECKPOINTS, STEPS, at_least


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Say when to save, which checkpoints to keep, and which to start from.

    Attributes:
        every: Steps between saves; 0: only at the end or on a stop signal.
        keep_last: Number of newest checkpoints to keep. The newest that a finite step followed is
            kept in any case, so that a run whose weights have diverged can go back.
        keep_every: Checkpoints at multiples of this many steps are kept too; 0: none.
        asynchronous: Copy to the host's memory, and write during training. Otherwise training waits
            until the files are written. Either way a checkpoint has its name after the next step
            that finds its digests made; a kill before that leaves the one before it.
        resume_from: A step to go back to, among the run's checkpoints; 0: the newest. Newer ones
            are kept under other names. It acts once: a later start with the same value goes on from
            the newest.
        load: A checkpoint whose weights a new run starts from.
        verify: What is compared when a checkpoint or a folder of tokens is opened. `full`: the
            SHA-256 of every file, which reads each file once. `size`: sizes, and the SHA-256 of the
            small files beside a checkpoint's tensors; a changed tensor is not noticed.
        fallback: Whether a run whose newest checkpoint is damaged goes on from the newest whole
            one. The damaged one is kept under another name.
    """

    every: int = at_least(0, 0, STEPS)
    keep_last: int = at_least(1, 2, CHECKPOINTS)
    keep_every: int = at_least(0, 0, STEPS)
    asynchronous: bool = False
    resume_from: int = at_least(0, 0, STEPS)
    load: str = ""
    verify: Literal["full", "size"] = "full"
    fallback: bool = True
