"""The output layer and its loss in one, without ever holding the logits of all tokens.

With hidden states x, output weight W and targets y, token t has

    lse_t = log sum_v exp(x_t . W_v)        loss_t = lse_t - x_t . W_(y_t)
    dlogits_tv = dloss_t (exp(x_t . W_v - lse_t) - [v = y_t])
    dx = dlogits W                          dW = dlogits^T x

Forward makes the logits of a chunk of tokens, reduces them to the two terms and forgets them;
backward makes them again, chunk by chunk, from the kept lse (as arXiv:2411.09009 does tile by
tile). Gradients could be had in forward with one product in four less, but only for a gradient of
the loss that is known there; so the loss stays one number a token, for any mask and normalisation,
nothing of the weight's size waits for backward, and evaluation pays for forward alone.

With the vocabulary cut over tensor-parallel ranks (arXiv:1909.08053) lse and target logit are
combined over the ranks for all tokens at once: one maximum and one sum of two numbers a token.
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
    """A rank's rows of the output weight: tokens `first` to `first + real - 1`, then padding.

    group: the tensor-parallel ranks that hold the rest, None: nobody. sequence_parallel: whether
    they also hold each its own part of the hidden states.
    """

    first: int
    real: int
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False

    @property
    def parts(self) -> int:
        """How many ranks' hidden states make the tokens whole."""
        return self.group.size() if self.group is not None and self.sequence_parallel else 1

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """`[t, vocab / tp]` in fp32 or wider, for x `[t, h]`; -inf for padding."""
        logits = (x @ weight.t()).to(_wide(x.dtype))
        logits[:, self.real :] = -torch.inf
        return logits

    def columns(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Where in this rank's logits each target is, `[t, 1]`, and whether it is there at all."""
        local = targets.reshape(-1, 1) - self.first
        here = (local >= 0) & (local < self.real)
        return local.masked_fill(~here, 0), here

    def whole(self, x: Tensor) -> Tensor:
        """All ranks' x `[t, h]`, one after the other."""
        if self.parts == 1:
            return x
        return gather_from_sequence_parallel_region(x, group=self.group)  # type: ignore[arg-type]


def output_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, chunk: int
) -> Tensor:
    """Losses in nats `[s, b]`, fp32 or wider, alike on all ranks of the shard's group.

    hidden: `[s, b, h]`, or `[s / tp, b, h]` under sequence parallelism; weight: `[vocab / tp, h]`,
    padding rows take no part and get a zero gradient; targets: int64 `[s, b]`; chunk: tokens whose
    logits exist at once.
    """
    parts = shard.parts
    step = max(1, chunk // parts)
    losses = _OutputLoss.apply(
        hidden.flatten(0, 1), weight, targets.reshape(parts, -1), shard, step
    )
    return losses.view(targets.shape)


class _OutputLoss(Function):
    """hidden `[n, h]` on this rank, targets `[parts, n]`; `step` tokens of every part at once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, step: int
    ) -> Tensor:
        lse = hidden.new_empty(targets.shape, dtype=_wide(hidden.dtype))
        picked = torch.empty_like(lse)
        for rows in _steps(len(hidden), step):
            found = _two_terms(shard.whole(hidden[rows]), weight, targets[:, rows], shard)
            lse[:, rows], picked[:, rows] = (x.view(len(targets), -1) for x in found)
        if shard.group is not None:
            lse, picked = _over_ranks(lse, picked, shard.group)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.shard, ctx.step = shard, step
        return lse - picked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        [dout] = grads
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            # Sums over chunks are kept in fp32, and rounded to the weight's dtype once.
            dweight = torch.zeros_like(weight, dtype=_wide(weight.dtype))
        under_way: list[Any] = []
        for rows in _steps(len(hidden), ctx.step):
            x = shard.whole(hidden[rows])
            dlogits = _dlogits(x, weight, targets[:, rows], shard, lse[:, rows], dout[:, rows])
            if dhidden is not None:
                under_way += _send_home(dlogits @ weight, dhidden[rows], shard)
            if dweight is not None:
                _add_product_(dweight, dlogits, x)
            del dlogits  # or two chunks of them would live while the next one is made
        for work in under_way:
            work.wait()
        # Returned and not added to Megatron's main_grad: so every hook runs once, as for any
        # other weight, and a tied embedding's two gradients are summed by autograd.
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _steps(count: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, count, step))


def _two_terms(
    x: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """lse and the targets' logits `[t]`, over this rank's columns: 0 for a target elsewhere."""
    logits = shard.logits(x, weight)
    column, here = shard.columns(targets)
    picked = logits.gather(1, column).masked_fill_(~here, 0)
    return _log_sum_exp_(logits), picked


def _dlogits(
    x: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, lse: Tensor, dout: Tensor
) -> Tensor:
    """`[t, vocab / tp]` in x's dtype, from the whole lse and the gradient of the t losses."""
    dlogits = shard.logits(x, weight).sub_(lse.reshape(-1, 1)).exp_()
    column, here = shard.columns(targets)
    dlogits.scatter_add_(1, column, -here.to(dlogits.dtype))
    return dlogits.mul_(dout.reshape(-1, 1)).to(x.dtype)


def _log_sum_exp_(logits: Tensor) -> Tensor:
    """`[t]`; overwrites the logits, so that no second tensor of their size is made."""
    # On a rank of padding alone every maximum is -inf: clamped, the sum is 0 and not NaN.
    top = logits.amax(1).clamp_(min=torch.finfo(logits.dtype).min)
    return logits.sub_(top[:, None]).exp_().sum(1).log_().add_(top)


def _over_ranks(lse: Tensor, picked: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """lse over all ranks' columns, and the target's logit from the one rank that has it."""
    top = lse.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    sums = torch.stack([lse.sub_(top).exp_(), picked])
    dist.all_reduce(sums, group=group)
    return sums[0].log_().add_(top), sums[1]


def _send_home(partial: Tensor, dx: Tensor, shard: VocabShard) -> list[Any]:
    """Sums the ranks' partial gradients of x into `dx`; what is still under way is returned."""
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
