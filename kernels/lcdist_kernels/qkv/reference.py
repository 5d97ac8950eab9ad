"""Split and rotation as plain torch operations."""

from torch import Tensor

from lcdist_kernels.qkv.shape import QkvShape
from lcdist_kernels.rotary import Rotary


def split_qkv_reference(
    mixed: Tensor, shape: QkvShape, rotary: Rotary | None = None, positions: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q `[b, s, h, d]` and k, v `[b, s, h_kv, d]`; differentiable, and as `split_qkv`."""
    q, k, v = (x.transpose(0, 1).flatten(2, 3) for x in shape.parts(mixed))
    if rotary is None:
        return q, k, v
    assert positions is not None
    return rotary.rotate(q, positions), rotary.rotate(k, positions), v
