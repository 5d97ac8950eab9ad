"""RMSNorm of the residual stream in one node (arXiv:1910.07467).

    t = x + delta        n = t r w        r = 1 / sqrt(mean(t^2) + eps)

The stream goes on from here, so t is an output beside n, and t's gradient has two parts that meet
in one pass, with a = t r and g = dn w:

    dx = ddelta = r (g - a mean(g a)) + dt        dw = sum over tokens of dn a

Saved are t and r, an fp32 number a token; from them `scale_rows` makes n again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lcdist_kernels.common import wide_dtype
from lcdist_kernels.norm import kernel
from lcdist_kernels.rows import use_row_kernels


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (t, n, r): t = x + delta, n = t r w and r = 1 / sqrt(mean(t^2) + eps).

    Args:
        x: `[.., h]`, bf16, fp16, fp32 or float64.
        delta: as x; None: t is x itself, without a copy.
        weight: w `[h]`, in the dtype of x.
        eps: added to the mean square.
        impl: "auto" (kernels on CUDA below float64), "triton" or "torch".

    Returns:
        t and n like x, and r `[.., 1]`, without a gradient, in the wider of fp32 and x.dtype.

    Raises:
        ValueError: shapes or dtypes differ, or kernels do not take x.
    """
    fits = weight.shape == x.shape[-1:] and weight.dtype == x.dtype
    if not fits or (delta is not None and (delta.shape, delta.dtype) != (x.shape, x.dtype)):
        shapes = [(tuple(y.shape), y.dtype) for y in (x, delta, weight) if y is not None]
        raise ValueError(f"{shapes}: expected x and delta of one shape [.., h] and a weight [h]")
    return _AddNorm.apply(x, delta, weight, eps, use_row_kernels(impl, x))


class _AddNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, by_kernel: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, normed, rstd = (kernel.fwd if by_kernel else fwd)(x, delta, weight, eps)
        ctx.by_kernel = by_kernel
        # A gradient that nobody asks for is not made as zeros.
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rstd)
        # Hooks of saved tensors would tie an output to this node, and this node to it.
        ctx.save_for_backward(total.detach(), rstd, weight)
        return total, normed, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total, rstd, weight = ctx.saved_tensors
        dtotal, dnormed, _ = grads
        needs_dx, needs_ddelta, needs_dweight = ctx.needs_input_grad[:3]
        dx, dweight = dtotal, None
        if dnormed is not None:
            gradient = kernel.bwd if ctx.by_kernel else bwd
            dx, dweight = gradient(total, rstd, weight, dnormed, dtotal, needs_dweight)
        return dx if needs_dx else None, dx if needs_ddelta else None, dweight, None, None


def scale_rows(total: Tensor, rstd: Tensor, weight: Tensor, impl: str = "auto") -> Tensor:
    """Return the n of `add_norm` from its t and r, bit for bit; not differentiable.

    Args:
        total: t `[.., h]`.
        rstd: r `[.., 1]`.
        weight: w `[h]`.
        impl: as in `add_norm`.
    """
    return (kernel.scale if use_row_kernels(impl, total) else _scale)(total, rstd, weight)


def fwd(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return t, n and r of x and delta `[.., h]`."""
    total = x if delta is None else x + delta
    wide = wide_dtype(x.dtype)
    norm = torch.linalg.vector_norm(total, dim=-1, keepdim=True, dtype=wide)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return total, _scale(total, rstd, weight), rstd


def _scale(total: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    return (total * rstd).mul_(weight).to(total.dtype)


def bwd(
    total: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dnormed: Tensor,
    dtotal: Tensor | None,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of t `[.., h]` and of the weight, if it is asked for.

    Args:
        total: t `[.., h]`.
        rstd: r `[.., 1]`.
        weight: w `[h]`.
        dnormed: gradient of n.
        dtotal: gradient of t from elsewhere, to be added.
        needs_dweight: whether the weight asks for a gradient.
    """
    wide = rstd.dtype
    direction = total * rstd
    products = direction * dnormed
    dweight = products.flatten(0, -2).sum(0).to(weight.dtype) if needs_dweight else None
    mean = torch.matmul(products, weight.to(wide)).div_(total.shape[-1])
    del products
    dx = torch.mul(dnormed.to(wide), weight).addcmul_(direction, mean[..., None], value=-1)
    dx = dx.mul_(rstd)
    if dtotal is not None:
        dx = dx.add_(dtotal)
    return dx.to(total.dtype), dweight
