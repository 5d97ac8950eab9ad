"""A step of AdamW over many tensors, in which the host waits for nothing.

The formulas are in `reference.py`. What scales the gradients, and whether anything is written at
all, are numbers on the device.
"""

import torch
from torch import Tensor

from lcdist_kernels import apex
from lcdist_kernels.adamw import batched, kernel
from lcdist_kernels.adamw.tensors import Hyper, Tensors
from lcdist_kernels.extensions import find
from lcdist_kernels.step_kernels import resolved, step_kernels

IMPLS = ("auto", "triton", "torch")


def adamw_(tensors: Tensors, totals: Tensor, hyper: Hyper, impl: str = "auto") -> None:
    """Update masters, moments and weights in place; all or none of them.

    Nothing is written if the loss or a gradient is not finite, or no token has a loss.

    Args:
        tensors: contiguous, on the device of totals.
        totals: float64 `[4]`: the summed loss, the number of its tokens, the squared norm of all
            summed gradients, and the same with every copy of a gradient, to see what is not finite.
        hyper: constants of the step.
        impl: "auto" is the kernel on CUDA for fp32 masters, elsewhere torch's fused AdamW.

    Raises:
        ValueError: tensors that do not fit, or an implementation that does not take them.
    """
    _check(tensors, totals)
    if impl not in IMPLS:
        raise ValueError(f"impl = {impl!r} is unknown: use one of {', '.join(IMPLS)}")
    impl = resolved(impl)
    is_fp32 = all(x.dtype == torch.float32 for x in tensors.masters)
    if impl == "triton" and not is_fp32:
        raise ValueError("impl = 'triton': the kernel takes fp32 masters")
    by_apex = impl == "auto" and is_fp32 and step_kernels() == "apex"
    module = find(apex.PARTS["adamw"], totals.device) if by_apex else None
    if impl == "triton" or (impl == "auto" and is_fp32 and totals.is_cuda and module is None):
        kernel.update(tensors, totals, hyper)
    else:
        batched.update(tensors, totals, hyper, module)


def _check(tensors: Tensors, totals: Tensor) -> None:
    """Raise ValueError unless the tensors fit each other."""
    if totals.shape != (4,) or totals.dtype != torch.float64:
        raise ValueError(f"totals {tuple(totals.shape)}, {totals.dtype}: expected float64 [4]")
    for gradient, master, first, second, weight, *_ in zip(*tensors, strict=True):
        alike = (gradient, first, second)
        fits = all(x.shape == master.shape and x.dtype == master.dtype for x in alike)
        given = [*alike, master, *([] if weight is None else [weight])]
        if not fits or not all(x.is_contiguous() for x in given):
            shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in given)
            raise ValueError(f"{shapes}: expected contiguous tensors of one shape")
