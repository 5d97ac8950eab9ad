"""Group the tensors of a step of AdamW, and its constants."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tensors(NamedTuple):
    """The trained tensors: sequences of one length, where those of one number have one shape.

    Attributes:
        gradients: sums over tokens, like masters. Read only.
        masters: fp32 or wider.
        first, second: the two moments, like masters.
        weights: each master's copy in bf16, fp16 or fp32, or None where the master is the weight.
        decays: weight decay.
        lr_ratios: learning rate relative to `Hyper.lr`.
    """

    gradients: Sequence[Tensor]
    masters: Sequence[Tensor]
    first: Sequence[Tensor]
    second: Sequence[Tensor]
    weights: Sequence[Tensor | None]
    decays: Sequence[float]
    lr_ratios: Sequence[float]

    def some(self, numbers: Sequence[int]) -> "Tensors":
        """Return the tensors with these numbers."""
        fields: list[Any] = [[field[i] for i in numbers] for field in self]
        return Tensors(*fields)


class Hyper(NamedTuple):
    """Constants of a step.

    Attributes:
        lr: learning rate.
        beta1, beta2, eps: AdamW's.
        step: number of this step, from 1, for bias correction.
        clip_norm: largest norm of the mean gradient; 0: no clipping.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    step: int
    clip_norm: float


def scale_of(totals: Tensor, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Return what multiplies gradients, and whether the step is refused: float64 and bool scalars.

    totals: as of `adamw_`.
    """
    loss, tokens, squares, all_squares = totals.double().unbind()
    scale = 1 / tokens
    if clip_norm:
        scale = torch.minimum(scale, clip_norm / squares.sqrt())
    return scale, ~(loss.isfinite() & all_squares.isfinite() & (tokens > 0))
