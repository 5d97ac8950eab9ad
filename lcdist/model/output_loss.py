"""Output layer and cross-entropy in one operation, with logits in the model's dtype alone.

With hidden states x, output weight W and targets y, token t has

    lse_t = log sum_v exp(x_t . W_v)        loss_t = lse_t - x_t . W_(y_t)
    dlogits_tv = dloss_t (exp(x_t . W_v - lse_t) - [v = y_t])
    dx = dlogits W                          dW = dlogits^T x

Forward reduces logits to the two terms of a loss (`lcdist_kernels.vocab_loss`). Either it keeps
them, and backward overwrites them with dlogits. Or it computes them for a chunk of tokens and drops
them, and backward computes them again, chunk by chunk (arXiv:2411.09009 does so tile by tile): a
fourth product of this size. Computing gradients in forward would save that product too, but needs
dloss in forward. As it is, the loss is one number a token for any mask and normalisation, no tensor
of the weight's size waits for backward, and evaluation pays for forward alone.

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
from lcdist.model.gradient import accumulate, add_product
from lcdist_kernels import vocab_loss
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

    def gather(self, x: Tensor) -> Tensor:
        """Return the hidden states `[t, h]` of all ranks, concatenated."""
        if self.parts == 1:
            return x
        return gather_from_sequence_parallel_region(x, group=self.group)  # type: ignore[arg-type]

    def stats(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return lse and target logits over this rank's columns, like targets `[parts, n]`."""
        found = vocab_loss.stats(logits, targets.reshape(-1), self.first, self.num_tokens)
        lse, target_logits = (x.view(targets.shape) for x in found)
        return lse, target_logits

    def dlogits_(self, logits: Tensor, targets: Tensor, lse: Tensor, dout: Tensor) -> Tensor:
        """Overwrite the logits with dlogits and return them; the others are `[parts, n]`."""
        targets, lse, dout = (x.reshape(-1) for x in (targets, lse, dout))
        return vocab_loss.grad_(logits, targets, lse, dout, self.first, self.num_tokens)


def output_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, chunk: int | None
) -> Tensor:
    """Return losses in nats `[s, b]`, in fp32 or wider, equal on all ranks of the shard's group.

    Args:
        hidden: `[s, b, h]`, or `[s / tp, b, h]` under sequence parallelism.
        weight: `[vocab / tp, h]`; padding rows have no effect and get a zero gradient.
        targets: int64 `[s, b]`.
        shard: this rank's part of the vocabulary.
        chunk: tokens whose logits exist at the same time; None: all, kept until backward.
    """
    parts = shard.parts
    step = None if chunk is None else max(1, chunk // parts)
    losses = _OutputLoss.apply(
        hidden.flatten(0, 1), weight, targets.reshape(parts, -1), shard, step
    )
    return losses.view(targets.shape)


class _OutputLoss(Function):
    """Losses of hidden `[n, h]` and targets `[parts, n]`, `step` tokens of every part at a time.

    step: None: all tokens at once, and their logits are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        shard: VocabShard,
        step: int | None,
    ) -> Tensor:
        terms, kept = [], None
        for rows in _steps(len(hidden), step):
            logits = shard.gather(hidden[rows]) @ weight.t()
            terms.append(shard.stats(logits, targets[:, rows]))
            kept = logits if step is None else None
            del logits  # otherwise two chunks of logits are alive during the next iteration
        lse, target_logits = (
            parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            for parts in zip(*terms, strict=True)
        )
        if shard.group is not None:
            lse, target_logits = _combine_ranks(lse, target_logits, shard.group)
        ctx.save_for_backward(hidden, targets, lse, kept)
        # The parameter itself: saved-tensor hooks would bring back another object.
        ctx.weight, ctx.shard, ctx.step = weight, shard, step
        ctx.is_overwritten = False
        return lse - target_logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, lse, kept = ctx.saved_tensors
        weight, shard = ctx.weight, ctx.shard
        [dout] = grads
        if ctx.is_overwritten:
            # A second backward of the same graph computes the logits again.
            kept = None
        ctx.is_overwritten = True
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = None
        reductions: list[Any] = []
        for rows in _steps(len(hidden), ctx.step):
            x = shard.gather(hidden[rows])
            # Autograd refuses saved tensors that changed; `data` changes without its notice.
            logits = x @ weight.t() if kept is None else kept.data
            dlogits = shard.dlogits_(logits, targets[:, rows], lse[:, rows], dout[:, rows])
            if dhidden is not None:
                reductions += _reduce_into(dhidden[rows], dlogits, weight, shard)
            if ctx.needs_input_grad[1]:
                dweight = _add_product(dweight, weight, dlogits, x, len(x) == targets.numel())
            del logits, dlogits  # as in forward
        for work in reductions:
            work.wait()
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None, None


def _steps(count: int, step: int | None) -> Iterator[slice]:
    step = step or max(1, count)
    return (slice(start, start + step) for start in range(0, count, step))


def _combine_ranks(
    lse: Tensor, target_logits: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return lse over all ranks' columns, and the target logits from the ranks that hold them."""
    maximum = lse.clone()
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group)
    sums = torch.stack([lse.sub_(maximum).exp_(), target_logits])
    dist.all_reduce(sums, group=group)
    return sums[0].log_().add_(maximum), sums[1]


def _reduce_into(dx: Tensor, dlogits: Tensor, weight: Tensor, shard: VocabShard) -> list[Any]:
    """Write dlogits W, summed over the ranks, into `dx`; return the reductions still in flight."""
    if shard.parts > 1:
        partial = dlogits @ weight
        dx.copy_(reduce_scatter_to_sequence_parallel_region(partial, group=shard.group))  # type: ignore[arg-type]
        return []
    torch.mm(dlogits, weight, out=dx)
    return [] if shard.group is None else [dist.all_reduce(dx, group=shard.group, async_op=True)]


def _add_product(
    total: Tensor | None, weight: Tensor, dlogits: Tensor, x: Tensor, is_only: bool
) -> Tensor | None:
    """Add dlogits^T x to the weight's `main_grad`, and return what stands for it in autograd.

    Without `main_grad`, return total + dlogits^T x, in fp32 or wider unless it is the only chunk's.
    """
    if is_only or hasattr(weight, "main_grad"):
        return accumulate(weight, dlogits, x)
    if total is None:
        total = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    add_product(total, dlogits, x)
    return total
