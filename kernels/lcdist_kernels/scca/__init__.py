"""Shifted cross chunk attention and related patterns: chunk windows and dilated keys."""

from lcdist_kernels.scca.op import IMPLS, scca_attention
from lcdist_kernels.scca.part import Part
from lcdist_kernels.scca.part_work import Parts
from lcdist_kernels.scca.reference import scca_reference
from lcdist_kernels.scca.rules import HeadGroup, Rule, dense_mask, head_groups, slices
from lcdist_kernels.scca.tiled import banded_bwd, banded_fwd, self_parts, window_parts

__all__ = [
    "IMPLS",
    "HeadGroup",
    "Part",
    "Parts",
    "Rule",
    "banded_bwd",
    "banded_fwd",
    "dense_mask",
    "head_groups",
    "scca_attention",
    "scca_reference",
    "self_parts",
    "slices",
    "window_parts",
]
