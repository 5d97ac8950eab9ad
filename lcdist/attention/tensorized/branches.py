"""The grid of a call and the bias of its heads' branches."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from lcdist.attention.shape import HeadSlice
from lcdist.attention.tensorized.plan import make_grid
from lcdist_kernels import tensorized as ops
from lcdist_kernels.common import wide_dtype
from lcdist_kernels.tensorized import ModeGrid


class Call(Protocol):
    """Describe a layer, as both `AttentionContext` and `CacheSpec` do."""

    @property
    def options(self) -> Any: ...
    @property
    def heads(self) -> HeadSlice: ...
    @property
    def params(self) -> Mapping[str, Tensor] | None: ...


def grid_and_bias(q: Tensor, k: Tensor, call: Call) -> tuple[ModeGrid, Tensor]:
    """Return the grid, and the bias of the tensor's own heads in the wider of fp32 and q.dtype."""
    grid = make_grid(call.options, call.heads, (q.shape[2], k.shape[2]))
    bias = (call.params or {}).get("branch_bias")
    if bias is None:
        bias = ops.initial_bias_for(q, grid.modes)
    elif bias.shape[-1] == call.heads.nheads:
        bias = bias[..., call.heads.first : call.heads.first + q.shape[2]]
    ops.check_bias(bias, grid, q.shape[2])
    return grid, bias.to(q.device, wide_dtype(q.dtype))
