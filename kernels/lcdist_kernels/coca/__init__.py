"""Collinear constrained attention (CoCA): keys whose rotated pairs share one coefficient."""

from lcdist_kernels.coca.impl import TORCH_IMPL, TRITON_IMPL, CoCAImpl, select_coca_impl
from lcdist_kernels.coca.op import coca_attention
from lcdist_kernels.coca.reference import coca_keys, coca_queries, coca_reference, coca_tau
from lcdist_kernels.coca.transform import (
    VARIANTS,
    check_variant,
    collinear,
    collinear_bwd,
    keys,
    keys_bwd,
    queries,
    queries_bwd,
    rotary_angles,
)
from lcdist_kernels.full import IMPLS

__all__ = [
    "IMPLS",
    "TRITON_IMPL",
    "TORCH_IMPL",
    "VARIANTS",
    "CoCAImpl",
    "rotary_angles",
    "check_variant",
    "coca_attention",
    "coca_keys",
    "select_coca_impl",
    "coca_queries",
    "coca_reference",
    "coca_tau",
    "collinear",
    "collinear_bwd",
    "keys",
    "keys_bwd",
    "queries",
    "queries_bwd",
]
