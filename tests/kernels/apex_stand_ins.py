"""Modules with the names and functions of apex's extensions, and torch's mathematics.

Their signatures were read from github.com/NVIDIA/apex at 6424da3b4faa6c8f062da4a48c424fff3f02d42d.
"""

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from lcdist_kernels import apex, extensions
from lcdist_kernels.step_kernels import choose_step_kernels


class StandIns:
    """Extensions that count their calls; a factor other than 1 makes their results wrong."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.calls: list[str] = []

    def modules(self) -> dict[str, Any]:
        """Return the extensions by name."""
        functions = {
            "fused_weight_gradient_mlp_cuda": [self.wgrad_gemm_accum_fp32],
            "fused_layer_norm_cuda": [self.rms_forward_affine, self.rms_backward_affine],
            "amp_C": [self.multi_tensor_adam_capturable],
        }
        made = {name: ModuleType(name) for name in functions}
        for name, module in made.items():
            for function in functions[name]:
                setattr(module, function.__name__, function)
        return made

    def wgrad_gemm_accum_fp32(self, x: Tensor, dy: Tensor, total: Tensor) -> None:
        """Add dy^T x to total."""
        assert x.is_contiguous() and dy.is_contiguous() and total.is_contiguous()
        self.calls.append("weights")
        total += self.factor * (dy.float().t() @ x.float())

    def rms_forward_affine(
        self, x: Tensor, shape: Sequence[int], weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return the norm, and 1 / rms of each row."""
        assert x.is_contiguous() and tuple(shape) == tuple(weight.shape)
        self.calls.append("norm")
        rows = x.reshape(-1, *shape).float()
        rstd = (rows.square().mean(-1) + eps).rsqrt()
        normed = self.factor * rows * rstd[:, None] * weight
        return normed.to(x.dtype).view(x.shape), rstd

    def rms_backward_affine(
        self,
        dout: Tensor,
        rstd: Tensor,
        x: Tensor,
        shape: Sequence[int],
        weight: Tensor,
        eps: float,
        memory_efficient: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of x and weight."""
        assert dout.is_contiguous() and x.is_contiguous() and not memory_efficient
        with torch.enable_grad():
            leaves = [x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()]
            out = torch.nn.functional.rms_norm(leaves[0], tuple(shape), leaves[1], eps)
        dx, dweight = torch.autograd.grad(out, leaves, dout.float())
        return dx.to(x.dtype), dweight.to(weight.dtype)

    def multi_tensor_adam_capturable(
        self,
        chunk: int,
        noop: Tensor,
        lists: Sequence[Sequence[Tensor]],
        lr: Tensor,
        beta1: float,
        beta2: float,
        eps: float,
        step: Tensor,
        mode: int,
        bias_correction: int,
        weight_decay: float,
        inv_scale: Tensor,
    ) -> None:
        """Update the second to fourth lists, unless noop is 1."""
        assert mode == 1 and bias_correction == 1 and noop.dtype == step.dtype == torch.int32
        self.calls.append("adamw")
        if int(noop):
            return
        for gradient, master, first, second in zip(*lists, strict=True):
            gradient.mul_(inv_scale)
            first.lerp_(gradient, 1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            root = (second / (1 - beta2 ** int(step))).sqrt().add_(eps)
            update = first / (1 - beta1 ** int(step)) / root + weight_decay * master
            master.sub_(self.factor * lr * update)


@contextmanager
def apex_installed(stand_ins: StandIns, kernels: str = "apex") -> Iterator[StandIns]:
    """Put the extensions where imports find them, and choose `kernels`, inside the block."""
    with installed(stand_ins.modules(), kernels):
        yield stand_ins


def forget_extensions() -> None:
    """Let every part be searched again."""
    extensions._found.cache_clear()
    extensions._USED.clear()


@contextmanager
def installed(modules: dict[str, Any], kernels: str) -> Iterator[None]:
    """Put modules where imports find them, and choose `kernels`, inside the block."""
    # `patch.dict` would also forget every other module that is imported inside the block.
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    forget_extensions()
    choose_step_kernels(kernels)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)
        forget_extensions()
        choose_step_kernels("auto")


@contextmanager
def package_apex(folder: Path, *files: str) -> Iterator[None]:
    """Make a package `apex` of these files in `folder`, and put it where imports find it.

    Importing it fails, as the package index's does where its own dependencies are missing.
    """
    for name in ("__init__.py", *files):
        path = folder / "apex" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("import pyramid_that_is_not_installed\n")
    with patch.object(sys, "path", [str(folder), *sys.path]):
        importlib.invalidate_caches()
        apex.other_project.cache_clear()
        try:
            yield
        finally:
            apex.other_project.cache_clear()
