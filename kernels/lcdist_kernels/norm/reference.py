"""RMSNorm of a sum by its formula; the other implementations are compared with it."""

import torch
from torch import Tensor


def add_norm_reference(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return t = x + delta `[.., h]` (t = x without delta) and t / rms(t) * weight."""
    total = x if delta is None else x + delta
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    rms = torch.sqrt(wide.square().mean(-1, keepdim=True) + eps)
    return total, (wide / rms * weight).to(total.dtype)
