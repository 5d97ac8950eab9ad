"""A tensor whose elements lie in pieces of flat vectors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Elements first to first + count of the vector that `load` returns."""

    load: Callable[[], Tensor]
    first: int
    count: int


@dataclass(frozen=True)
class FlatTensor:
    """A tensor whose elements, in row-major order, are `segments`; elements after them are padding.

    dtype: safetensors' name of it, such as "F32".
    """

    dtype: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]

    def rows(self, first: int, stop: int) -> Tensor:
        """Return a copy of rows first to stop."""
        width = math.prod(self.shape[1:])
        parts = cut(self.segments, first * width, (stop - first) * width)
        elements = [part.load()[part.first : part.first + part.count] for part in parts]
        # A frozen parameter can be stored as one that takes a gradient.
        return torch.cat(elements).detach().view(stop - first, *self.shape[1:])


def cut(segments: Sequence[Segment], first: int, count: int) -> list[Segment]:
    """Return elements first to first + count of the concatenated `segments`."""
    found, position = [], 0
    for segment in segments:
        begin, end = max(first, position), min(first + count, position + segment.count)
        if begin < end:
            found.append(Segment(segment.load, segment.first + begin - position, end - begin))
        position += segment.count
    return found
