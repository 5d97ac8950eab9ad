"""Torch's own attention of one document on a CPU, in the form of `tiled.full_fwd` and `full_bwd`.

`scaled_dot_product_attention` calls the same two operators, so the bits are the same; called here,
forward gives lse and backward takes it.
"""

import torch
from torch import Tensor

from lcdist_kernels.full.impl import AttentionImpl

_FLASH = 1
"""Number of torch's choice that has these operators."""


def takes(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> bool:
    """Return whether torch computes these tensors `[b, s, h, d]` by its operators for a CPU."""
    qkv, grouped = _heads_first(q, k, v), q.shape[2] != k.shape[2]
    if q.device.type != "cpu":
        return False
    choose = torch.ops.aten._fused_sdp_choice
    choice = choose(*qkv, None, 0.0, True, scale=softmax_scale, enable_gqa=grouped)
    return choice == _FLASH


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _fwd(
    q: Tensor, k: Tensor, v: Tensor, q_idx: Tensor, q_lo: Tensor, k_idx: Tensor,
    softmax_scale: float, *,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (out, lse) of a sequence over itself; out_dtype is q's."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = attend(*_heads_first(q, k, v), 0.0, True, scale=softmax_scale)
    return out.transpose(1, 2), lse


def _bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    q_idx: Tensor, q_lo: Tensor, k_idx: Tensor, softmax_scale: float, *,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dq, dk, dv), in the dtype of q, which grad_dtype is."""
    dout, q, k, v, out = _heads_first(dout, q, k, v, out)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, True, scale=softmax_scale
    )
    dq, dk, dv = _heads_first(*grads)
    return dq, dk, dv


TORCH_CPU_IMPL = AttentionImpl(_fwd, _bwd)
