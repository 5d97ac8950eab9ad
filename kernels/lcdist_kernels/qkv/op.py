"""`split_qkv`: the fused projection's output to contiguous, rotated q, k and v, and back.

Views of the product would keep all of it alive until backward, and the queries of different groups
lie too unevenly to be a view. So each is written once, rotated on the way, and the product is free.
Backward writes the gradient of the product once, in place of three parts and their concatenation.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lcdist_kernels.qkv.kernel import join_by_kernel, split_by_kernel
from lcdist_kernels.qkv.shape import QkvShape
from lcdist_kernels.rotary import Rotary
from lcdist_kernels.step_kernels import resolved
from lcdist_kernels.triton_common import use_kernels


class _Turn(NamedTuple):
    """Rotation of q and k by positions; none where rotary is None."""

    rotary: Rotary | None
    positions: Tensor | None


def split_qkv(
    mixed: Tensor,
    shape: QkvShape,
    rotary: Rotary | None = None,
    positions: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return contiguous q `[b, s, h, d]` and k, v `[b, s, h_kv, d]`.

    Args:
        mixed: `[s, b, h_kv * (r + 2) * d]`, its last dimension contiguous.
        shape: how heads lie in it.
        rotary: rotation of q and k; None: they stay as they are.
        positions: integers `[s]` or `[b, s]`, as `Rotary.rotate` takes them.
        impl: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes do not fit each other, or kernels do not take such tensors.
    """
    queries = shape.parts(mixed)[0]
    like = queries[:0].transpose(0, 1).flatten(2, 3)
    by_kernel = use_kernels(resolved(impl), like, "split of queries, keys and values")
    return _SplitQkv.apply(mixed, shape, _Turn(rotary, positions), by_kernel)


class _SplitQkv(Function):
    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, shape: QkvShape, turn: _Turn, by_kernel: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.shape, ctx.turn, ctx.by_kernel = shape, turn, by_kernel
        if by_kernel:
            return split_by_kernel(mixed, shape, turn.rotary, turn.positions)
        q, k, v = (x.transpose(0, 1).flatten(2, 3) for x in shape.parts(mixed))
        if turn.rotary is not None and turn.positions is not None:
            q, k = (turn.rotary.rotate(x, turn.positions) for x in (q, k))
        return q.contiguous(), k.contiguous(), v.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        shape, turn = ctx.shape, ctx.turn
        if ctx.by_kernel:
            return join_by_kernel(grads, shape, turn.rotary, turn.positions), None, None, None
        dq, dk, dv = grads
        if turn.rotary is not None and turn.positions is not None:
            dq, dk = (turn.rotary.rotate_back(x, turn.positions) for x in (dq, dk))
        batch, seqlen, nheads_kv, head_dim = dk.shape
        width = nheads_kv * (shape.group + 2) * head_dim
        dmixed = torch.empty(seqlen, batch, width, dtype=dk.dtype, device=dk.device)
        for part, grad in zip(shape.parts(dmixed), (dq, dk, dv), strict=True):
            part.copy_(grad.unflatten(2, (nheads_kv, -1)).transpose(0, 1))
        return dmixed, None, None, None
