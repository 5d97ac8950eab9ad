"""The attention operators of lcdist as torch functions: usable alone, they never import lcdist."""

from lcdist_kernels.full import full_attention, full_reference
from lcdist_kernels.rotary import Rotary

__all__ = ["Rotary", "full_attention", "full_reference"]
