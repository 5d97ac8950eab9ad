"""RMSNorm of the residual stream in one node (arXiv:1910.07467).

    t = x + delta        n = t r w        r = 1 / sqrt(mean(t^2) + eps)

The stream goes on from here, so t is an output beside n, and t's gradient has two parts that meet
in one pass, with a = t r and g = dn w:

    dx = ddelta = r (g - a mean(g a)) + dt        dw = sum over tokens of dn a

Saved are t and r, an fp32 number a token; from them `scale_rows` makes n again.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lcdist_kernels import apex, transformer_engine
from lcdist_kernels.extensions import find
from lcdist_kernels.norm import kernel, plain
from lcdist_kernels.norm.by_library import ByLibrary
from lcdist_kernels.rows import use_row_kernels
from lcdist_kernels.step_kernels import step_kernels

# By `step_kernels`.
_LIBRARIES: dict[str, Any] = {"apex": apex, "te": transformer_engine}


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
    return _AddNorm.apply(x, delta, weight, eps, _maker(impl, x, eps))


class _AddNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, maker: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, normed, rstd = maker.fwd(x, delta, weight, eps)
        ctx.maker = maker
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
            dx, dweight = ctx.maker.bwd(total, rstd, weight, dnormed, dtotal, needs_dweight)
        return dx if needs_dx else None, dx if needs_ddelta else None, dweight, None, None


def scale_rows(
    total: Tensor, rstd: Tensor, weight: Tensor, eps: float, impl: str = "auto"
) -> Tensor:
    """Return the n of `add_norm` from its t and r, bit for bit; not differentiable.

    Args:
        total: t `[.., h]`.
        rstd: r `[.., 1]`.
        weight: w `[h]`.
        eps, impl: as in `add_norm`.
    """
    return _maker(impl, total, eps).scale(total, rstd, weight)


def _maker(impl: str, x: Tensor, eps: float) -> Any:
    """Return what computes norms like those of x: an object with `fwd`, `bwd` and `scale`."""
    library = _LIBRARIES.get(step_kernels()) if impl == "auto" else None
    if library is not None and x.dtype in library.DTYPES:
        module = find(library.PARTS["norm"], x.device)
        if module is not None:
            return ByLibrary(library, module, eps)
    return kernel if use_row_kernels(impl, x) else plain
