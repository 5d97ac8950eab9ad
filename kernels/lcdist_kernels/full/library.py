"""Plain causal attention by the fastest library at hand: FlashAttention 3 or 2, or torch's own.

Libraries are found by what they can be called with, not by version (arXiv:2407.08608, 2307.08691).
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from lcdist_kernels.common import log_choice

Fused = Callable[[Tensor, Tensor, Tensor, float], Tensor]

HALF = (torch.bfloat16, torch.float16)
# FlashAttention's module, and the least and greatest compute capability that it is built for.
FLASH = (("flash_attn_interface", 9, 9), ("flash_attn", 8, 99))


def library_for(q: Tensor) -> Fused | None:
    """What runs plain causal attention of tensors like q `[b, s, h, d]` without documents, if any.

    On the CPU torch's own; on CUDA a fused one for half precision and a head_dim that all of them
    take, None for the rest, where torch's own would make all the scores.
    """
    if not q.is_cuda:
        log_choice("full attention: torch's scaled_dot_product_attention, as it covers this case")
        return _torch
    if q.dtype not in HALF or q.shape[3] % 8 or q.shape[3] > 256:
        return None
    flash = _flash(torch.cuda.get_device_capability(q.device)[0])
    if flash is None:
        log_choice(
            "full attention: torch's scaled_dot_product_attention; no FlashAttention is here"
        )
    return flash or _torch


def _torch(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


@cache
def _flash(capability: int) -> Fused | None:
    for name, least, greatest in FLASH:
        if not least <= capability <= greatest or find_spec(name) is None:
            continue
        try:
            attend = import_module(name).flash_attn_func
        except (ImportError, AttributeError) as error:
            log_choice(f"full attention: {name} is here and cannot be used: {error}")
            continue
        log_choice(f"full attention: flash_attn_func of {name}")
        return _called(attend)
    return None


def _called(attend: Callable[..., Tensor | tuple[Tensor, ...]]) -> Fused:
    def fused(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = attend(q, k, v, softmax_scale=softmax_scale, causal=True)
        # Some releases of FlashAttention 3 return the logsumexp beside it.
        return out[0] if isinstance(out, tuple) else out

    return fused
