"""Megatron's vocabulary-parallel embedding, whose gradient goes into `main_grad` by rows.

Autograd would make a gradient of the whole table, zero it and add it to `main_grad`: three passes
over a table of which a micro-batch uses a few rows.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.model.gradient import accumulate_rows
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)


class Embedding(VocabParallelEmbedding):
    """Megatron's embedding; tokens of other ranks' rows are 0 until the sum over ranks."""

    def forward(self, input_: Tensor) -> Tensor:
        """Return hidden states `[b, s, h]`; `[s / tp, b, h]` under sequence parallelism.

        input_: tokens `[b, s]`.
        """
        out = _Lookup.apply(self.weight, input_, self.vocab_start_index)
        if self.reduce_scatter_embeddings:
            out = out.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(out, group=self.tp_group)


class _Lookup(Function):
    """Rows of a weight for tokens `[..]` from `first` on; 0 for tokens without a row."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, first: int) -> Tensor:
        # The parameter itself: saved-tensor hooks would bring back another object.
        ctx.weight, ctx.first = weight, first
        ctx.save_for_backward(tokens)
        rows, outside = _rows(tokens, first, len(weight))
        return F.embedding(rows, weight).masked_fill_(outside[..., None], 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        [tokens], [dy] = ctx.saved_tensors, grads
        rows, outside = _rows(tokens, ctx.first, len(ctx.weight))
        dy = dy.masked_fill(outside[..., None], 0).flatten(0, -2)
        return accumulate_rows(ctx.weight, rows.flatten(), dy), None, None


def _rows(tokens: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Return each token's row among `count` rows from token `first` on, and whether it has none."""
    rows = tokens - first
    outside = (rows < 0) | (rows >= count)
    return rows.masked_fill(outside, 0), outside
