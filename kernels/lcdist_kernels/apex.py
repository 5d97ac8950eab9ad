"""NVIDIA's apex, by what of it can be called and passes a self-test.

    part         extension                        what it does
    weights      fused_weight_gradient_mlp_cuda   main += dy^T x, bf16 or fp16 products into fp32
    norm         fused_layer_norm_cuda            RMSNorm and its gradients, without a residual
    adamw        amp_C                            AdamW over lists of tensors, refused on the device

apex is built from source (APEX_CPP_EXT=1 APEX_CUDA_EXT=1), and the name on the package index is
another project's. The functions read raw pointers: what is given to them is checked here.
"""

from collections.abc import Sequence
from functools import cache, partial
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcdist_kernels.common import log_choice
from lcdist_kernels.extensions import Part, norm_is_right

BUILD = "build NVIDIA's apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1"
# Elements that one block of apex's kernels takes.
CHUNK = 2048 * 32
# apex's number for decoupled weight decay.
DECOUPLED = 1
# Of tensors that its norm is used for.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@cache
def other_project() -> str | None:
    """Return a sentence on an installed package `apex` that is not NVIDIA's, and log it once.

    The one of the package index is a web project. It is told from NVIDIA's by its files, without
    importing it; None where there is no such package.
    """
    spec = find_spec("apex")
    # Without an origin it is a folder of that name: a clone in the working directory, say.
    if spec is None or spec.origin is None:
        return None
    if PathFinder.find_spec("apex.normalization", spec.submodule_search_locations or []):
        return None
    said = f"the installed package apex ({spec.origin}) is another project, not NVIDIA's"
    log_choice(f"{said}: ignored")
    return said


# --- weight gradients -----------------------------------------------------------------------------


def add_product(module: Any, total: Tensor, dy: Tensor, x: Tensor) -> None:
    """Add dy^T x to fp32 `total` `[out, in]`, for dy `[n, out]` and x `[n, in]`."""
    assert total.dtype == torch.float32 and total.is_contiguous() and dy.dtype == x.dtype
    assert total.shape == (dy.shape[1], x.shape[1]) and len(dy) == len(x)
    module.wgrad_gemm_accum_fp32(x.contiguous(), dy.contiguous(), total)


@torch.no_grad()
def _weights_test(module: Any, device: torch.device) -> bool:
    # Small integers: every sum is exact.
    numbers = torch.arange(16 * 24, device=device).view(16, 24) % 7 - 3
    x, dy = numbers.bfloat16(), numbers[:, :8].bfloat16()
    total = torch.ones(8, 24, device=device)
    add_product(module, total, dy, x)
    return torch.equal(total, 1 + dy.float().t() @ x.float())


# --- norm -----------------------------------------------------------------------------------------


def norm_fwd(module: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x `[.., h]`, and 1 / rms, fp32 `[.., 1]`."""
    normed, rstd = module.rms_forward_affine(x.contiguous(), weight.shape, weight, eps)
    return normed.view(x.shape), rstd.view(*x.shape[:-1], 1)


def norm_bwd(
    module: Any, dnormed: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight."""
    dx, dweight = module.rms_backward_affine(
        dnormed.contiguous(), rstd.flatten(), x.contiguous(), weight.shape, weight, eps, False
    )
    return dx.view(x.shape), dweight


@torch.no_grad()
def _norm_test(module: Any, device: torch.device) -> bool:
    return norm_is_right(partial(norm_fwd, module), partial(norm_bwd, module), device)


# --- AdamW ----------------------------------------------------------------------------------------


class AdamWStep(NamedTuple):
    """Constants of a step of AdamW for some tensors.

    Attributes:
        lr, beta1, beta2, eps, weight_decay: AdamW's.
        step: number of this step, from 1.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


def adamw(
    module: Any, lists: Sequence[Sequence[Tensor]], step: AdamWStep, is_refused: Tensor
) -> None:
    """Update [gradients, masters, first, second], fp32; nothing where `is_refused` is true.

    is_refused: bool scalar on the device. The gradients may be overwritten.
    """
    device = is_refused.device
    assert all(x.dtype == torch.float32 and x.is_contiguous() for row in lists for x in row)
    module.multi_tensor_adam_capturable(
        CHUNK,
        is_refused.to(torch.int32).view(1),
        [list(row) for row in lists],
        torch.full((), step.lr, device=device),
        step.beta1,
        step.beta2,
        step.eps,
        torch.full((), step.step, dtype=torch.int32, device=device),
        DECOUPLED,
        1,
        step.weight_decay,
        torch.ones((), device=device),
    )


@torch.no_grad()
def _adamw_test(module: Any, device: torch.device) -> bool:
    made = torch.Generator().manual_seed(0)
    gradient, master, first = (torch.randn(70, generator=made).to(device) for _ in range(3))
    second = torch.rand(70, generator=made).to(device)
    step = AdamWStep(1e-2, 0.9, 0.95, 1e-8, 0.1, 3)
    m = 0.9 * first + 0.1 * gradient
    v = 0.95 * second + 0.05 * gradient * gradient
    update = (m / (1 - 0.9**3)) / ((v / (1 - 0.95**3)).sqrt() + 1e-8) + 0.1 * master
    expected = [master - 1e-2 * update, m, v]
    for refused in (True, False):
        before = [x.clone() for x in (master, first, second)]
        is_refused = torch.full((), refused, device=device)
        adamw(module, [[gradient.clone()], [master], [first], [second]], step, is_refused)
        wanted = before if refused else expected
        got = (master, first, second)
        if not all(torch.allclose(a, b, 1e-5, 1e-6) for a, b in zip(got, wanted, strict=True)):
            return False
    return True


_OF_APEX = (
    Part(
        "weights",
        "apex",
        "fused_weight_gradient_mlp_cuda",
        ("wgrad_gemm_accum_fp32",),
        _weights_test,
    ),
    Part(
        "norm",
        "apex",
        "fused_layer_norm_cuda",
        ("rms_forward_affine", "rms_backward_affine"),
        _norm_test,
    ),
    Part("adamw", "apex", "amp_C", ("multi_tensor_adam_capturable",), _adamw_test),
)
PARTS = {part.name: part for part in _OF_APEX}
