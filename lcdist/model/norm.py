"""RMSNorm in the shape Megatron's layers ask for (arXiv:1910.07467)."""

from typing import Any

import torch

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """x / rms(x) * weight over the last dimension; x `[s, b, hidden_size]`.

    Megatron's own norm for machines without Transformer Engine refuses sequence parallelism.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Under sequence parallelism each rank sees a part of the tokens: Megatron sums the
        # gradients of parameters marked so over the tensor-parallel group.
        vars(self.weight)["sequence_parallel"] = config.sequence_parallel
