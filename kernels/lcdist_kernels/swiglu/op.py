"""SwiGLU, z = silu(g) * u, of gate and up in one tensor (arXiv:2002.05202).

    dg = dz u s (1 + g (1 - s))        du = dz g s        s = sigmoid(g)

Backward needs g and u, and nothing needs them afterwards. So it writes dg and du over them: a layer
holds gate and up once, and never beside their gradients. In the same pass it can make z again, for
the weight gradient of the product that follows: then z need not be kept.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lcdist_kernels.rows import as_rows, use_row_kernels
from lcdist_kernels.swiglu import kernel


def swiglu(gate_up: Tensor, impl: str = "auto") -> Tensor:
    """Return silu(g) * u `[.., n]` of gate_up = (g, u) `[.., 2 n]`; save gate_up alone.

    Backward runs once and overwrites gate_up with its gradient, unless it is a leaf, a view of one,
    or has no rows as kernels want them: such are copied first. Whoever else saved gate_up gets an
    error from autograd.

    Args:
        gate_up: bf16, fp16, fp32 or float64.
        impl: "auto" (kernels on CUDA below float64), "triton" or "torch".

    Raises:
        ValueError: gate_up has an odd width, or kernels do not take it.
        RuntimeError: a second backward (`retain_graph`), whose inputs are gone.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up of shape {tuple(gate_up.shape)}: expected gate and up [.., 2 n]")
    return _SwiGLU.apply(gate_up, use_row_kernels(impl, gate_up))


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, by_kernel: bool) -> Tensor:
        rows = as_rows(gate_up)
        owner = gate_up if gate_up._base is None else gate_up._base
        if owner.is_leaf and owner.requires_grad:
            rows = rows.clone()
        ctx.by_kernel, ctx.shape, ctx.overwritten = by_kernel, gate_up.shape, False
        ctx.save_for_backward(rows)
        z = kernel.fwd(rows) if by_kernel else fwd(rows)
        return z.view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Saved-tensor hooks take autograd's own check away.
        if ctx.overwritten:
            raise RuntimeError(
                "SwiGLU's backward has already run and overwritten gate and up with their "
                "gradients: run the forward again instead of a second backward"
            )
        [rows], [dz] = ctx.saved_tensors, grads
        ctx.overwritten = True
        rows = rows.detach()
        (kernel.bwd_ if ctx.by_kernel else bwd_)(rows, as_rows(dz))
        return rows.view(ctx.shape), None


def swiglu_gradient_(
    gate_up: Tensor, dz: Tensor, again: bool, impl: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """Overwrite gate_up `[.., 2 n]` with its gradient; for Functions that apply SwiGLU themselves.

    Args:
        gate_up: of the caller alone, outside of any graph.
        dz: gradient of z `[.., n]`, of the caller alone; it may be overwritten.
        again: make z again.
        impl: as for `swiglu`.

    Returns:
        The gradient of gate_up, and z or None.
    """
    rows, shape = as_rows(gate_up), dz.shape
    gradient = kernel.bwd_ if use_row_kernels(impl, gate_up) else bwd_
    z = gradient(rows, as_rows(dz), again)
    return rows.view(gate_up.shape), None if z is None else z.view(shape)


def fwd(gate_up: Tensor) -> Tensor:
    """Return z `[rows, n]` of gate_up `[rows, 2 n]`."""
    gate, up = _halves(gate_up)
    return F.silu(gate).mul_(up)


def bwd_(gate_up: Tensor, dz: Tensor, again: bool = False) -> Tensor | None:
    """Overwrite gate_up `[rows, 2 n]` with its gradient, given that of z.

    again: return z; otherwise None.
    """
    gate, up = _halves(gate_up)
    activated = F.silu(gate)
    z = activated * up if again else None
    torch.ops.aten.silu_backward.grad_input(up.mul_(dz), gate, grad_input=gate)
    torch.mul(activated, dz, out=up)
    return z


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    width = gate_up.shape[1] // 2
    return gate_up[:, :width], gate_up[:, width:]
