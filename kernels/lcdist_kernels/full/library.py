"""Plain causal attention by the fastest installed library: FlashAttention 3 or 2, or torch.

A library is found by the function it offers, not by its version (arXiv:2407.08608, 2307.08691).
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from lcdist_kernels.common import log_choice
from lcdist_kernels.triton_common import last_dim_contiguous

Fused = Callable[[Tensor, Tensor, Tensor, float], Tensor]

HALF = (torch.bfloat16, torch.float16)
# FlashAttention's module, and the lowest and highest compute capability it is built for.
FLASH = (("flash_attn_interface", 9, 9), ("flash_attn", 8, 99))


def library_for(q: Tensor) -> Fused | None:
    """Return a library's plain causal attention for q `[b, s, h, d]`, or None.

    On the CPU this is torch's. On CUDA it is a fused one, for half precision and head dims that all
    of them take. Elsewhere it is None, as torch would materialise all scores.
    """
    if not q.is_cuda:
        log_choice("full attention: torch's scaled_dot_product_attention")
        return _torch
    if q.dtype not in HALF or q.shape[3] % 8 or q.shape[3] > 256:
        return None
    flash = _flash(torch.cuda.get_device_capability(q.device)[0])
    if flash is None:
        log_choice(
            "full attention: torch's scaled_dot_product_attention; FlashAttention is not installed"
        )
    return flash or _torch


def _torch(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """Call torch's scaled_dot_product_attention."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


@cache
def _flash(capability: int) -> Fused | None:
    """Return FlashAttention for a compute capability, or None."""
    for name, least, greatest in FLASH:
        if not least <= capability <= greatest or find_spec(name) is None:
            continue
        try:
            attend = import_module(name).flash_attn_func
        except (ImportError, AttributeError) as error:
            log_choice(f"full attention: {name} is installed but cannot be used: {error}")
            continue
        log_choice(f"full attention: flash_attn_func of {name}")
        return _wrap(attend)
    return None


def _wrap(attend: Callable[..., Tensor | tuple[Tensor, ...]]) -> Fused:
    """Adapt flash_attn_func to `Fused`."""

    def fused(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        q, k, v = (last_dim_contiguous(x) for x in (q, k, v))
        out = attend(q, k, v, softmax_scale=softmax_scale, causal=True)
        # Some releases of FlashAttention 3 return (out, logsumexp).
        return out[0] if isinstance(out, tuple) else out

    return fused
