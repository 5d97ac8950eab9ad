"""Define the settings of generation, its callbacks and its figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lcdist.attention.cache import SwapCount
from lcdist.inference.sampling import GREEDY, Sampling
from lcdist.utils.progress import Progress, silent


@dataclass(frozen=True)
class Watch:
    """Name the functions to call while texts are generated.

    Attributes:
        progress: With the tokens of the prompts that are read.
        on_token: With each new token and the number of its text; None: nobody.
        on_figures: At the end, with what the texts took.
    """

    progress: Progress = silent
    on_token: Callable[[int, int], None] | None = None
    on_figures: "Callable[[Figures], None] | None" = None


@dataclass
class Figures:
    """Record the time and memory of generation on one rank.

    Attributes:
        read: Tokens of prompts, landmarks included.
        reading_seconds: Time to read them.
        steps: Steps after that. Each adds a token to every text that goes on.
        step_seconds: Time of the steps.
        cache_bytes: Most bytes of the cache on the device, for one text.
        swaps: Blocks that were read from a cache in host memory; None without one.
    """

    read: int = 0
    reading_seconds: float = 0.0
    steps: int = 0
    step_seconds: float = 0.0
    cache_bytes: int = 0
    swaps: SwapCount | None = None

    @classmethod
    def total(cls, figures: "Sequence[Figures]") -> "Figures":
        """Return the sums of figures, and the most bytes of a cache."""
        whole = cls()
        for one in figures:
            whole.add(one)
        return whole

    def add(self, other: "Figures") -> None:
        """Add the figures of other texts."""
        self.read += other.read
        self.reading_seconds += other.reading_seconds
        self.steps += other.steps
        self.step_seconds += other.step_seconds
        self.cache_bytes = max(self.cache_bytes, other.cache_bytes)
        self.swaps = SwapCount.total(self.swaps, other.swaps)


@dataclass(frozen=True)
class Generation:
    """Say how texts are continued.

    Attributes:
        max_new_tokens: Upper limit of a continuation.
        sampling: How tokens are chosen.
        stops: Tokens that end a continuation; they belong to it.
        piece: Most tokens of a prompt that a context-parallel rank reads at once.
        device_blocks: Blocks of a text and key head that landmark attention with top_k keeps on
            the device, the rest being in host memory; None: all of them.
    """

    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    stops: frozenset[int] = frozenset()
    piece: int = 4096
    device_blocks: int | None = None
