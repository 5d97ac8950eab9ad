"""The norm with the residual before it as plain torch operations, both ways."""

import torch
from torch import Tensor

from lcdist_kernels.common import wide_dtype


def fwd(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return t, n and r of x and delta `[.., h]`."""
    total = x if delta is None else x + delta
    wide = wide_dtype(x.dtype)
    norm = torch.linalg.vector_norm(total, dim=-1, keepdim=True, dtype=wide)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return total, scale(total, rstd, weight), rstd


def scale(total: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """Return n of t `[.., h]` and r `[.., 1]`."""
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
