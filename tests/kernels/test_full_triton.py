"""Full attention's kernels: against the dense reference, block by block, on a ring, and refused.

Without a GPU they run in Triton's interpreter; tests marked `gpu` need one.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist_kernels import full_attention, full_reference
from tests.kernels.helpers import (
    assert_kernels_are_right,
    on_device,
    rotated_and_packed,
    wide,
)
from tests.kernels.test_full import with_grads
from tests.kernels.tiers import tiered


def truth_of(qkv: list[Tensor], dout: Tensor, **more: Any) -> list[Tensor]:
    doubles = wide(qkv)
    return with_grads(full_reference(*doubles, **more), doubles, dout.cpu().double())


SHAPES = [(n, (4, 2), 16) for n in (1, 63, 100, 257, 128)]
SHAPES += [(100, heads, 16) for heads in ((8, 8), (8, 4), (8, 1))]
SHAPES += [(70, (2, 1), head_dim) for head_dim in (18, 48, 80, 128, 256)]

PACKED_SHAPES = [(packed, *shape) for shape in SHAPES for packed in (False, True)]


@pytest.mark.parametrize(
    ("packed", "seqlen", "heads", "head_dim"),
    tiered(PACKED_SHAPES, {1, 2, 5, 6, 9, 11, 12, 15, 17, 20}),
)
def test_equals_reference(seqlen: int, heads: tuple[int, int], head_dim: int, packed: bool) -> None:
    qkv = on_device(seqlen, heads, head_dim, torch.float32)
    more = rotated_and_packed(seqlen, head_dim, packed)
    assert_kernels_are_right(full_attention, truth_of, qkv, **more)
