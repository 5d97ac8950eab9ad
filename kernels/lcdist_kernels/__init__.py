"""Attention operators of lcdist as torch functions, usable without the rest of lcdist."""

from lcdist_kernels.coca import coca_attention, coca_reference
from lcdist_kernels.full import full_attention, full_reference
from lcdist_kernels.landmark import landmark_attention, landmark_reference
from lcdist_kernels.lssar import lssar_attention, lssar_reference
from lcdist_kernels.rotary import Rotary
from lcdist_kernels.scca import scca_attention, scca_reference
from lcdist_kernels.tensorized import tensorized_attention, tensorized_reference

__all__ = [
    "Rotary",
    "coca_attention",
    "coca_reference",
    "full_attention",
    "full_reference",
    "landmark_attention",
    "landmark_reference",
    "lssar_attention",
    "lssar_reference",
    "scca_attention",
    "scca_reference",
    "tensorized_attention",
    "tensorized_reference",
]
