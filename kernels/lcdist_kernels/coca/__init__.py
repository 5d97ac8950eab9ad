"""Collinear constrained attention (CoCA): keys whose rotated pairs share one coefficient."""

from lcdist_kernels.coca.impl import KERNEL, TILED, CoCAOperator, coca_operator
from lcdist_kernels.coca.op import BUILT, coca_attention
from lcdist_kernels.coca.reference import coca_keys, coca_queries, coca_reference, coca_tau
from lcdist_kernels.coca.transform import (
    VARIANTS,
    angles,
    check_variant,
    collinear,
    collinear_bwd,
    keys,
    keys_bwd,
    queries,
    queries_bwd,
)

__all__ = [
    "BUILT",
    "KERNEL",
    "TILED",
    "VARIANTS",
    "CoCAOperator",
    "angles",
    "check_variant",
    "coca_attention",
    "coca_keys",
    "coca_operator",
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
