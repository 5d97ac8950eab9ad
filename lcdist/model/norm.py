"""RMSNorm with the constructor that Megatron's layers call (arXiv:1910.07467)."""

from typing import Any

import torch

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """Computes x / rms(x) * weight over the last dimension of x `[s, b, hidden_size]`.

    Megatron's norm for machines without Transformer Engine does not support sequence parallelism.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Under sequence parallelism each rank sees a part of the tokens. Megatron sums gradients of
        # parameters with this mark over the tensor-parallel group.
        vars(self.weight)["sequence_parallel"] = config.sequence_parallel
