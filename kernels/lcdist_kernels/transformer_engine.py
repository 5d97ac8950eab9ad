"""NVIDIA's Transformer Engine: its RMSNorm, in bf16, fp16 and fp32.

The functions of its extension for torch are called, without its modules, FP8 and quantizers.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lcdist_kernels.extensions import Part, norm_is_right

BUILD = "install transformer-engine[pytorch] for this build of torch"
# Its names of the dtypes that its norm is used for.
DTYPES = {torch.bfloat16: "kBFloat16", torch.float16: "kFloat16", torch.float32: "kFloat32"}
# Multiprocessors that the kernels leave alone.
_SM_MARGIN = 0
# Whether 1 is added to the weight.
_ZERO_CENTERED = False


def norm_fwd(module: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x `[.., h]`, and 1 / rms, fp32 `[.., 1]`."""
    out_dtype = getattr(module.DType, DTYPES[x.dtype])
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    # Neither a tensor to write to nor a quantizer.
    normed, _, rstd = module.rmsnorm_fwd(
        rows, weight, eps, None, None, out_dtype, _SM_MARGIN, _ZERO_CENTERED
    )
    return normed.view(x.shape), rstd.view(*x.shape[:-1], 1)


def norm_bwd(
    module: Any, dnormed: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight; eps is in `rstd` already."""
    dout, rows = (y.reshape(-1, x.shape[-1]).contiguous() for y in (dnormed, x))
    dx, dweight = module.rmsnorm_bwd(dout, rows, rstd.flatten(), weight, _SM_MARGIN, _ZERO_CENTERED)
    return dx.view(x.shape), dweight


@torch.no_grad()
def _norm_test(module: Any, device: torch.device) -> bool:
    return norm_is_right(partial(norm_fwd, module), partial(norm_bwd, module), device)


PARTS = {
    "norm": Part(
        "norm",
        "Transformer Engine",
        "transformer_engine_torch",
        ("rmsnorm_fwd", "rmsnorm_bwd", "DType"),
        _norm_test,
        loader="transformer_engine.pytorch",
    )
}
