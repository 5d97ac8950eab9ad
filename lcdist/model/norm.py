"""RMSNorm with the constructor that Megatron's layers call (arXiv:1910.07467)."""

from typing import Any

import torch
from torch import Tensor, nn

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.model.gradient import summed_over_tp
from lcdist_kernels.norm import add_norm, scale_rows
from megatron.core.transformer import TransformerConfig


class RMSNorm(nn.Module):
    """Computes x / rms(x) * weight over the last dimension of x `[s, b, hidden_size]`.

    Megatron's norm for machines without Transformer Engine does not support sequence parallelism.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps
        # Under sequence parallelism each rank sees a part of the tokens. Megatron sums gradients of
        # parameters with this mark over the tensor-parallel group.
        vars(self.weight)["sequence_parallel"] = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x."""
        return self.add(x, None)[1]

    def add(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return x + delta, or x itself without delta, its norm, and 1 / rms of each token.

        The stream goes on from the sum: so its gradients meet in one pass.
        """
        return add_norm(x, delta, summed_over_tp(self.weight), self.eps)

    def scale(self, x: Tensor, rstd: Tensor) -> Tensor:
        """Return the norm of x again, given 1 / rms of each token; not differentiable."""
        return scale_rows(x, rstd, self.weight, self.eps)


class HeadNorm(RMSNorm):
    """Normalizes each head of queries or keys `[.., heads, head_dim]` alone, as Qwen3 does.

    Every tensor-parallel rank has the whole weight and some of the heads, so backward sums its
    gradient over the ranks, with and without sequence parallelism.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__(config, hidden_size, eps)
        vars(self.weight).update(sequence_parallel=False, sums_over_tp=True)
