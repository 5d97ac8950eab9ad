"""Implementations of LSSA and LSSAR: tiled torch or kernels."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lcdist_kernels.lssar import epilogue, launch, tiled
from lcdist_kernels.lssar.rows import Reweight, RowResults
from lcdist_kernels.lssar.tiled import RowStats, Sums
from lcdist_kernels.triton_common import use_kernels


class LssarImpl(NamedTuple):
    """Functions of one implementation; `tiled` and `epilogue` describe their semantics.

    Torch takes queries and keys in the wider of fp32 and the dtype of v. Kernels take them in that
    dtype, queries times log2 e; `kernel` says which results have another unit.
    """

    sums: Callable[..., tuple[Tensor, Tensor]]
    fwd: Callable[..., Sums]
    whole: Callable[..., RowResults]
    rows: Callable[..., RowStats]
    bwd: Callable[..., tuple[Tensor, Tensor, Tensor]]


TORCH_IMPL = LssarImpl(
    tiled.lssar_sums,
    tiled.lssar_fwd,
    epilogue.lssar_whole,
    epilogue.lssar_rows,
    tiled.lssar_bwd,
)
TRITON_IMPL = LssarImpl(
    launch.lssar_sums,
    launch.lssar_fwd,
    launch.lssar_whole,
    launch.lssar_rows,
    launch.lssar_bwd,
)


def select_lssar_impl(
    impl: str, x: Tensor, what: str, reweight: Reweight | None = None
) -> LssarImpl:
    """Return the implementation that `impl` means for x `[b, s, h, d]`.

    As `full.select_impl`. Raises ValueError also for a power below 1 in half precision.
    """
    if reweight is not None and reweight.power < 1 and x.element_size() < 4:
        # y^(p - 1) is unbounded at the threshold. Directions rounded to half precision give dq and
        # dk an error of a tenth at p = 0.5, and at 0.3 it exceeds fp16's range.
        raise ValueError(
            f"power = {reweight.power:g} with {x.dtype}: below 1 the gradient is unbounded where a "
            "score meets its row's mean, which half precision cannot hold; use a power of at least "
            "1, or float32"
        )
    return TRITON_IMPL if use_kernels(impl, x, what) else TORCH_IMPL
