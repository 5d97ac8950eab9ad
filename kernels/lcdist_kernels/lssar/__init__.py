"""LSSA and LSSAR: length-scaled softplus attention, without and with re-weighting."""

from lcdist_kernels.lssar.directions_kernel import (
    Directions,
    DirectionTables,
    directions_bwd,
    directions_of,
)
from lcdist_kernels.lssar.epilogue import lssar_finish, lssar_rows, lssar_whole
from lcdist_kernels.lssar.impl import TORCH_IMPL, TRITON_IMPL, LssarImpl, select_lssar_impl
from lcdist_kernels.lssar.op import IMPLS, direction_tables, lssar_attention
from lcdist_kernels.lssar.reference import divisor, lssar_block, lssar_reference, softplus_scores
from lcdist_kernels.lssar.rows import (
    Band,
    Reweight,
    Threshold,
    directions,
    logit_scales,
    mean_shares,
    no_threshold,
    row_threshold,
)
from lcdist_kernels.lssar.tiled import Sums, lssar_bwd, lssar_fwd, lssar_sums

__all__ = [
    "IMPLS",
    "TRITON_IMPL",
    "TORCH_IMPL",
    "Band",
    "DirectionTables",
    "Directions",
    "LssarImpl",
    "Reweight",
    "Sums",
    "Threshold",
    "direction_tables",
    "directions",
    "directions_bwd",
    "directions_of",
    "divisor",
    "logit_scales",
    "lssar_attention",
    "lssar_block",
    "lssar_bwd",
    "lssar_finish",
    "lssar_fwd",
    "select_lssar_impl",
    "lssar_reference",
    "lssar_rows",
    "lssar_sums",
    "lssar_whole",
    "mean_shares",
    "no_threshold",
    "row_threshold",
    "softplus_scores",
]
