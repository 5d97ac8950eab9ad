"""Output layer and cross-entropy in one operation, without the logits of all tokens in memory.

With hidden states x, output weight W and targets y, token t has

    lse_t = log sum_v exp(x_t . W_v)        loss_t = lse_t - x_t . W_(y_t)
    dlogits_tv = dloss_t (exp(x_t . W_v - lse_t) - [v = y_t])
    dx = dlogits W                          dW = dlogits^T x

Forward computes the logits of a chunk of tokens, reduces them to the two terms and drops them.
Backward recomputes them chunk by chunk from the saved lse (arXiv:2411.09009 does so tile by tile).
Computing gradients in forward would save one product in four, but needs dloss in forward. As it is,
the loss is one number a token for any mask and normalisation, no tensor of the weight's size waits
for backward, and evaluation pays for forward alone.

If the vocabulary is sharded over tensor-parallel ranks (arXiv:1909.08053), lse and target logits
are combined over the ranks for all tokens at once: one maximum and one sum of two numbers a token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)


@dataclass(frozen=True)
class VocabShard:
    """A rank's rows of the output weight: a range of tokens, then padding.

    first: the first row's token.
    num_tokens: rows that belong to a token.
    group: the tensor-parallel ranks that share the vocabulary; None: this rank holds all of it.
    sequence_parallel: whether those ranks also shard the hidden states.
    """

    first: int
    num_tokens: int
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False

    @property
    def parts(self) -> int:
        """Number of ranks over which the hidden states are sharded."""
        return self.group.size() if self.group is not None and self.sequence_parallel else 1

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return logits `[t, vocab / tp]` for x `[t, h]` in fp32 or wider; -inf for padding."""
        logits = (x @ weight.t()).to(_wide(x.dtype))
        logits[:, self.num_tokens :] = -torch.inf
        return logits

    def columns(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return each target's column in this rank's logits, and whether it has one; `[t, 1]`."""
        local = targets.reshape(-1, 1) - self.first
        is_local = (local >= 0) & (local < self.num_tokens)
        return local.masked_fill(~is_local, 0), is_local

    def gather(self, x: Tensor) -> Tensor:
        """Return the hidden states `[t, h]` of all ranks, concatenated."""
        if self.parts == 1:
            return x
        return gather_from_sequence_parallel_region(x, group=self.group)  # type: ignore[arg-type]


def output_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, chunk: int
) -> Tensor:
    """Return losses in nats `[s, b]`, in fp32 or wider, equal on all ranks of the shard's group.

    Args:
        hidden: `[s, b, h]`, or `[s / tp, b, h]` under sequence parallelism.
        weight: `[vocab / tp, h]`; padding rows have no effect and get a zero gradient.
        targets: int64 `[s, b]`.
        shard: this rank's part of the vocabulary.
        chunk: tokens whose logits exist at the same time.
    """
    parts = shard.parts
    step = max(1, chunk // parts)
    losses = _OutputLoss.apply(
        hidden.flatten(0, 1), weight, targets.reshape(parts, -1), shard, step
    )
    return losses.view(targets.shape)


class _OutputLoss(Function):
    """Losses of hidden `[n, h]` and targets `[parts, n]`, `step` tokens of every part at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, step: int
    ) -> Tensor:
        lse = hidden.new_empty(targets.shape, dtype=_wide(hidden.dtype))
        target_logits = torch.empty_like(lse)
        for rows in _steps(len(hidden), step):
            terms = _loss_terms(shard.gather(hidden[rows]), weight, targets[:, rows], shard)
            lse[:, rows], target_logits[:, rows] = (x.view(len(targets), -1) for x in terms)
        if shard.group is not None:
            lse, target_logits = _combine_ranks(lse, target_logits, shard.group)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.shard, ctx.step = shard, step
        return lse - target_logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        [dout] = grads
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            # Sum over chunks in fp32 and round to the weight's dtype once.
            dweight = torch.zeros_like(weight, dtype=_wide(weight.dtype))
        reductions: list[Any] = []
        for rows in _steps(len(hidden), ctx.step):
            x = shard.gather(hidden[rows])
            dlogits = _dlogits(x, weight, targets[:, rows], shard, lse[:, rows], dout[:, rows])
            if dhidden is not None:
                reductions += _reduce_into(dhidden[rows], dlogits @ weight, shard)
            if dweight is not None:
                _add_product_(dweight, dlogits, x)
            del dlogits  # otherwise two chunks of logits are alive during the next iteration
        for work in reductions:
            work.wait()
        # Return the gradient instead of adding it to Megatron's main_grad. Every hook then runs
        # once, as for any other weight, and autograd sums a tied embedding's two gradients.
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _steps(count: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, count, step))


def _loss_terms(
    x: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Return lse and target logits `[t]` over this rank's columns; 0 for other ranks' targets."""
    logits = shard.logits(x, weight)
    column, is_local = shard.columns(targets)
    target_logits = logits.gather(1, column).masked_fill_(~is_local, 0)
    return _log_sum_exp_(logits), target_logits


def _dlogits(
    x: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, lse: Tensor, dout: Tensor
) -> Tensor:
    """Return dlogits `[t, vocab / tp]` in x's dtype from lse and dout `[t]` of all columns."""
    dlogits = shard.logits(x, weight).sub_(lse.reshape(-1, 1)).exp_()
    column, is_local = shard.columns(targets)
    dlogits.scatter_add_(1, column, -is_local.to(dlogits.dtype))
    return dlogits.mul_(dout.reshape(-1, 1)).to(x.dtype)


def _log_sum_exp_(logits: Tensor) -> Tensor:
    """Return the log-sum-exp `[t]`; overwrites the logits to save a tensor of their size."""
    # A rank with padding alone has maxima of -inf: clamping them makes the sum 0 instead of NaN.
    maximum = logits.amax(1).clamp_(min=torch.finfo(logits.dtype).min)
    return logits.sub_(maximum[:, None]).exp_().sum(1).log_().add_(maximum)


def _combine_ranks(
    lse: Tensor, target_logits: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return lse over all ranks' columns, and the target logits from the ranks that hold them."""
    maximum = lse.clone()
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group)
    sums = torch.stack([lse.sub_(maximum).exp_(), target_logits])
    dist.all_reduce(sums, group=group)
    return sums[0].log_().add_(maximum), sums[1]


def _reduce_into(dx: Tensor, partial: Tensor, shard: VocabShard) -> list[Any]:
    """Sum the ranks' partial gradients of x into `dx`; return the reductions still in flight."""
    if shard.parts > 1:
        dx.copy_(reduce_scatter_to_sequence_parallel_region(partial, group=shard.group))  # type: ignore[arg-type]
        return []
    dx.copy_(partial)
    return [] if shard.group is None else [dist.all_reduce(dx, group=shard.group, async_op=True)]


def _add_product_(dweight: Tensor, dlogits: Tensor, x: Tensor) -> None:
    if x.dtype == dweight.dtype:
        dweight.addmm_(dlogits.t(), x)
    else:
        dweight += dlogits.t() @ x
