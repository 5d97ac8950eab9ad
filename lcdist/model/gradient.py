"""Gradients of large weights, summed where the optimizer reads them.

A linear layer's dW = dy^T x goes straight into the parameter's fp32 `main_grad`, which Megatron's
data parallelism reduces and the optimizer reads; so do the rows of an embedding. Otherwise dW is
written in the weight's dtype, read again and added: three passes over memory instead of one, and a
rounding. The first product of a step overwrites `main_grad`, which nobody has to clear then.

Autograd still gets a tensor for the weight, because Megatron's hook, which runs when a parameter's
gradient arrives, expects one. It is a placeholder without meaning.
"""

from collections.abc import Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist_kernels import apex
from lcdist_kernels.extensions import find
from lcdist_kernels.step_kernels import step_kernels
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region


def accumulate(weight: Tensor, dy: Tensor, x: Tensor) -> Tensor | None:
    """Add dy^T x to the gradient of `weight`; return what a Function's backward returns for it.

    Pass the parameter itself: under saved-tensor hooks, what autograd saves comes back as another
    object, without `main_grad`.

    Args:
        weight: `[out, in]`.
        dy: gradient of the layer's output `[..., out]`.
        x: the layer's input `[..., in]`.

    Returns:
        The product where no engine has given the weight a `main_grad`. Otherwise a placeholder, or
        None for a weight that is also the embedding: its other gradient makes the hook run.
    """
    dy, x = dy.flatten(0, -2), x.flatten(0, -2)
    main, marks = getattr(weight, "main_grad", None), vars(weight)
    if main is None:
        return dy.t() @ x
    add_product(main, dy, x, overwrite=marks.get("main_grad_is_stale", False))
    marks["main_grad_is_stale"], marks["grad_added_to_main_grad"] = False, True
    return None if marks.get("is_tied_embedding") else _PLACEHOLDERS.like(weight)


def accumulate_rows(weight: Tensor, rows: Tensor, dy: Tensor) -> Tensor:
    """Add dy to the gradient of those rows of `weight`, in a fixed order; as `accumulate`.

    Args:
        weight: `[vocab, h]`.
        rows: row numbers, int64 `[n]`; some may be equal.
        dy: `[n, h]`.
    """
    main, marks = getattr(weight, "main_grad", None), vars(weight)
    if main is None:
        return torch.ops.aten.embedding_dense_backward(dy, rows, len(weight), -1, False)
    if marks.get("main_grad_is_stale", False):
        main.zero_()
    if main.is_cuda:
        # `index_add_` would add in any order.
        main.index_put_((rows,), dy.to(main.dtype), accumulate=True)
    else:
        main.index_add_(0, rows, dy.to(main.dtype))
    marks["main_grad_is_stale"], marks["grad_added_to_main_grad"] = False, True
    return _PLACEHOLDERS.like(weight)


def add_product(total: Tensor, dy: Tensor, x: Tensor, overwrite: bool = False) -> None:
    """Add dy^T x to `total` `[out, in]`, for dy `[n, out]` and x `[n, in]`.

    total: of the same dtype or fp32. On CUDA the product adds in fp32 without a tensor of its own,
        torch's or, where torch has none, apex's.
    overwrite: write the product instead, whatever `total` holds.
    """
    beta, kernels = 0 if overwrite else 1, step_kernels()
    if total.dtype == x.dtype:
        total.addmm_(dy.t(), x, beta=beta)
        return
    by_torch = x.is_cuda and _adds_in_fp32(x.dtype, x.device)
    wants_apex = kernels == "apex" or (kernels == "auto" and x.is_cuda and not by_torch)
    module = find(apex.PARTS["weights"], x.device) if wants_apex else None
    if module is not None:
        if overwrite:
            total.zero_()
        apex.add_product(module, total, dy, x)
    elif by_torch:
        torch.addmm(total, dy.t(), x, out_dtype=total.dtype, beta=beta, out=total)
    elif overwrite:
        total.copy_(dy.t() @ x)
    else:
        total += dy.t() @ x


def summed_over_tp(weight: Tensor) -> Tensor:
    """Return a weight that each tensor-parallel rank uses for its own tokens.

    Where the engine does not sum the gradients of such weights, their backward does.
    """
    if vars(weight).get("sums_over_tp", False):
        return copy_to_tensor_model_parallel_region(weight)
    return weight


def is_placeholder(grad: Tensor) -> bool:
    """Return whether a gradient that autograd brings only says that `main_grad` has it."""
    return _PLACEHOLDERS.contains(grad)


def claim(weight: nn.Parameter) -> None:
    """Mark a weight whose gradient comes from `accumulate` or `accumulate_rows`.

    Should autograd bring another gradient first, `main_grad` is cleared for it.
    """
    if weight.requires_grad and "main_grad_is_stale" not in vars(weight):
        vars(weight)["main_grad_is_stale"] = False
        weight.register_hook(partial(_clear_stale, weight))


def _clear_stale(weight: nn.Parameter, grad: Tensor) -> None:
    marks = vars(weight)
    if marks["main_grad_is_stale"] and not is_placeholder(grad):
        marks["main_grad"].zero_()
        marks["main_grad_is_stale"] = False


def start_step(parameters: Iterable[nn.Parameter]) -> None:
    """Make `main_grad` of all parameters stand for zero, before a step's first backward pass."""
    others = []
    for parameter in parameters:
        marks: dict[str, Any] = vars(parameter)
        marks["grad_added_to_main_grad"] = False
        if "main_grad_is_stale" in marks:
            marks["main_grad_is_stale"] = True
        else:
            others.append(marks["main_grad"])
    if others:
        torch._foreach_zero_(others)  # pyright: ignore[reportPrivateImportUsage]


@cache
def _adds_in_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether this torch multiplies `dtype` and adds to fp32 in one operation."""
    total = torch.zeros(16, 16, device=device)
    x = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(total, x, x, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


class _Placeholders:
    """One tensor for each dtype and device, as large as the largest weight that asked."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def like(self, weight: Tensor) -> Tensor:
        """Return a tensor of the weight's shape, not initialised; a new object at every call.

        Autograd takes over a gradient that nobody else refers to, without a copy.
        """
        key = weight.dtype, weight.device
        if key not in self._tensors or len(self._tensors[key]) < weight.numel():
            self._tensors[key] = weight.new_empty(weight.numel())
        return self._tensors[key][: weight.numel()].view(weight.shape).detach()

    def contains(self, grad: Tensor) -> bool:
        """Return whether a tensor came from `like`."""
        mine = self._tensors.get((grad.dtype, grad.device))
        return mine is not None and grad.untyped_storage()._cdata == mine.untyped_storage()._cdata


_PLACEHOLDERS = _Placeholders()
