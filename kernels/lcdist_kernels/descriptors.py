"""Tensor descriptors: tiles that a GPU of compute capability 9 loads by itself (TMA).

A descriptor holds base, shape, strides and box of a tensor, so a kernel needs no address or bound
in registers, and rows past the end are read as 0. Only tensors that fit have one; kernels take
pointers elsewhere, with the same results to the last bit. `landmark.list_boxes` alone sums in
another order.

A box is BLOCK rows of one head. Rows `step` tokens apart are neighbours in the view `[b, s / step,
step, h, d]`, so every descriptor has these five dimensions (`triton_common.load_box`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lcdist_kernels.triton_common import interpreting, padded

CAPABILITY = 9
ALIGNMENT = 16

_CHOICE: dict[str, bool] = {}


@contextmanager
def descriptors_set(on: bool) -> Iterator[None]:
    """Within, use descriptors wherever tensors fit, or never. For tests, also interpreted ones."""
    before = dict(_CHOICE)
    _CHOICE["on"] = on
    try:
        yield
    finally:
        _CHOICE.clear()
        _CHOICE.update(before)


def use_descriptors(*tensors: Tensor, step: int = 1) -> bool:
    """Return whether kernels load rows of tensors `[b, s, h, d]` by descriptors.

    step: tokens between rows of a tile.
    """
    return _wanted(tensors[0]) and all(map(partial(_fits, step=step), tensors))


def make_descriptors(block: int, *tensors: Tensor, step: int = 1) -> list[TensorDescriptor]:
    """Return a descriptor of tiles of `block` rows for each tensor `[b, s, h, d]`.

    Building one takes the host about 20 microseconds.
    """
    made = []
    for x in tensors:
        batch, seqlen, nheads, head_dim = x.shape
        stride_b, stride_s, stride_h, _ = x.stride()
        shape = [batch, seqlen // step, step, nheads, head_dim]
        strides = [stride_b, step * stride_s, stride_s, stride_h, 1]
        made.append(TensorDescriptor(x, shape, strides, [1, block, 1, 1, head_dim]))
    return made


def _wanted(x: Tensor) -> bool:
    if "on" in _CHOICE:
        return _CHOICE["on"]
    return not interpreting() and torch.cuda.get_device_capability(x.device)[0] == CAPABILITY


def _fits(x: Tensor, step: int) -> bool:
    """Return whether x can have a descriptor; storages begin at aligned addresses."""
    size, whole = x.element_size(), x.shape[3] == padded(x.shape[3])
    batch, token, head, feature = x.stride()
    # Low bits that any of them has.
    apart = (x.storage_offset() | batch | token | head) * size
    aligned = apart % ALIGNMENT == 0 and min(batch, token, head) > 0
    return size == 2 and whole and aligned and feature == 1 and x.shape[1] % step == 0
