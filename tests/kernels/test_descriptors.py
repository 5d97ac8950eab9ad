"""Descriptors: which tensors have one, and that kernels give the bits that pointers give.

Without a GPU kernels run in Triton's interpreter, which loads by descriptors too.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist_kernels import (
    descriptors,
    full_attention,
    landmark_attention,
    lssar_attention,
    scca_attention,
    tensorized_attention,
)
from lcdist_kernels.descriptors import descriptors_set, make_descriptors, use_descriptors
from lcdist_kernels.landmark import TRITON_IMPL, QueryRows
from lcdist_kernels.lssar import TRITON_IMPL as LSSAR
from lcdist_kernels.lssar import Band, Reweight
from lcdist_kernels.lssar.rows import Threshold
from lcdist_kernels.lssar.tiled import RowStats
from lcdist_kernels.scca import Rule
from lcdist_kernels.tensorized import ModeGrid
from tests.kernels.helpers import HERE
from tests.kernels.test_full import borders, with_grads
from tests.kernels.test_landmark_triton import some_lists
from tests.kernels.tiers import tiered

STEPS = {
    # Rules whose keys and rows are all 1, or all 4, tokens apart; keys alone 4 apart; and mixed.
    "near": (Rule("chunk", 16, 8), Rule("fold", 16, 48)),
    "far": (Rule("pair", 4, 1), Rule("pair", 4, 3)),
    "far keys": (Rule("key", 4, 2), Rule("key", 4, 1)),
    "mixed": (Rule("pair", 4, 1), Rule("chunk", 16, 8)),
}


def half(seqlen: int, head_dim: int, dtype: torch.dtype, batch: int = 1) -> list[Tensor]:
    """Return q, k and v of 4 and 2 heads, as leaves that are views of one tensor."""
    home = torch.randn(batch, seqlen, 8, head_dim, dtype=dtype, device=HERE)
    return [x.requires_grad_() for x in home.split((4, 2, 2), 2)]


def assert_same_bits_by_descriptors(
    attend: Callable[..., Tensor], qkv: list[Tensor], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Assert that results and gradients are the same, and that `count` descriptors were made."""
    dout, made = torch.randn_like(qkv[0]), []
    build = descriptors.TensorDescriptor

    def counting(*args: Any) -> Any:
        made.append(args)
        return build(*args)

    monkeypatch.setattr(descriptors, "TensorDescriptor", counting)
    with descriptors_set(False):
        expected = with_grads(attend(*qkv), qkv, dout)
    assert not made
    with descriptors_set(True):
        got = with_grads(attend(*qkv), qkv, dout)
    assert len(made) == count
    assert all(torch.isfinite(x).all() for x in got)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("seqlen", "head_dim", "packed", "dtype"),
    tiered(
        [
            (150, 16, True, torch.bfloat16),
            (128, 32, False, torch.float16),
            (63, 64, False, torch.bfloat16),
            (150, 16, False, torch.float16),
        ],
        {0, 1},
    ),
)
def test_full_attention(
    seqlen: int, head_dim: int, packed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cu_seqlens = borders(seqlen) if packed else None
    assert_same_bits_by_descriptors(
        lambda *qkv: full_attention(*qkv, cu_seqlens=cu_seqlens, impl="triton"),
        half(seqlen, head_dim, dtype),
        monkeypatch,
        6,
    )


# By descriptors: keys forward, keys and rows backward, two tensors each; none where steps differ.
@pytest.mark.parametrize(
    ("steps", "seqlen", "packed", "count"),
    tiered(
        [
            ("near", 150, False, 6),
            ("far", 200, True, 6),
            ("far keys", 200, False, 6),
            ("far", 150, False, 0),
            ("mixed", 100, True, 0),
            ("near", 128, True, 6),
        ],
        {0, 1, 2, 4},
    ),
)
def test_pieces(
    steps: str, seqlen: int, packed: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = STEPS[steps] * 2
    cu_seqlens = borders(seqlen) if packed else None
    assert_same_bits_by_descriptors(
        lambda *qkv: scca_attention(*qkv, rules=rules, cu_seqlens=cu_seqlens, impl="triton"),
        half(seqlen, 16, torch.bfloat16),
        monkeypatch,
        count,
    )


@pytest.mark.parametrize(
    ("seqlen", "block_size", "packed", "count"),
    tiered(
        [
            (150, 16, True, 4),
            (128, 64, False, 4),
            # Blocks of 12 have gaps in a tile, blocks of 256 are larger than one.
            (100, 12, False, 0),
            (300, 256, False, 0),
            (257, 32, True, 4),
        ],
        {0, 2},
    ),
)
def test_landmark_attention(
    seqlen: int, block_size: int, packed: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cu_seqlens = borders(seqlen) if packed else None
    assert_same_bits_by_descriptors(
        lambda *qkv: landmark_attention(
            *qkv, block_size=block_size, cu_seqlens=cu_seqlens, impl="triton"
        ),
        half(seqlen, 16, torch.bfloat16),
        monkeypatch,
        count,
    )


def assert_close_by_descriptors(
    attend: Callable[[], list[Tensor]], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Assert that results agree, and that `count` descriptors were made.

    Two blocks are two products, which by pointers are one that the interpreter sums in another
    order; without descriptors the bits are the same.
    """
    made, build = [], descriptors.TensorDescriptor
    with descriptors_set(False):
        expected = attend()
    monkeypatch.setattr(
        descriptors, "TensorDescriptor", lambda *args: made.append(args) or build(*args)
    )
    with descriptors_set(True):
        found = attend()
    assert len(made) == count
    for got, true in zip(found, expected, strict=True):
        tolerance = 2e-6 if got.dtype == torch.float32 else 2 * torch.finfo(got.dtype).eps
        if not count:
            tolerance = 0
        torch.testing.assert_close(got, true, rtol=tolerance, atol=tolerance)


# By descriptors: keys forward and for dq, two tensors each, where an interpreted tile, of 64 keys,
# has two blocks and a GPU's would have 128 keys.
@pytest.mark.parametrize(
    ("seqlen", "block_size", "head_dim", "unit", "packed", "batch", "count"),
    tiered(
        [
            # Chunks of short units, and long units.
            (129, 32, 128, 1, False, 1, 4),
            (150, 32, 128, 75, True, 2, 4),
            (150, 64, 128, 75, False, 1, 0),
            (100, 16, 128, 40, False, 1, 0),
            (100, 24, 128, 40, False, 1, 0),
            (150, 32, 64, 75, False, 1, 0),
            (150, 32, 128, 1, True, 2, 4),
            (161, 32, 128, 4096, False, 1, 4),
        ],
        {0, 1, 2},
    ),
)
def test_landmark_top_k(
    seqlen: int,
    block_size: int,
    head_dim: int,
    unit: int,
    packed: bool,
    batch: int,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choice: dict[str, Any] = {"block_size": block_size, "top_k": 3, "select_tokens": unit}
    choice["cu_seqlens"] = borders(seqlen) if packed else None
    qkv = half(seqlen, head_dim, torch.bfloat16, batch)
    dout = torch.randn_like(qkv[0])

    def attend() -> list[Tensor]:
        return with_grads(landmark_attention(*qkv, **choice, impl="triton"), qkv, dout)

    assert_close_by_descriptors(attend, monkeypatch, count)


def test_lists_of_a_table_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    size, index = 32, torch.arange(0, 7 * 32, 8)
    rows = QueryRows(index, torch.zeros_like(index), size)
    lists = some_lists(rows, torch.randperm(7), torch.tensor([1, 4, 4, len(index) - 9]), (1, 2))
    assert (lists.ids < 0).any()
    q = torch.randn(1, len(index), 4, 128, dtype=torch.float16, device=HERE)
    table = torch.randn(7, 2, size, 128, dtype=q.dtype, device=HERE)

    def attend() -> list[Tensor]:
        out, lse = TRITON_IMPL.sparse_fwd(q, table, lists, rows, 0.1)
        more = lse.clamp(min=0) + 0.5
        dq, dtable = TRITON_IMPL.sparse_bwd(q, q, table, q.float(), more, lists, rows, 0.1)
        return [out, lse, dq, dtable]

    assert_close_by_descriptors(attend, monkeypatch, 4)


# By descriptors: keys for the mean, keys and values forward, and two tensors in each of two kernels
# backward. LSSA has no mean.
@pytest.mark.parametrize(
    ("seqlen", "head_dim", "packed", "dtype", "reweight"),
    tiered(
        [
            (150, 16, True, torch.bfloat16, Reweight()),
            (128, 32, False, torch.float16, Reweight()),
            (200, 16, True, torch.bfloat16, None),
            (63, 64, False, torch.float16, None),
            (150, 16, False, torch.float16, Reweight(power=2.5)),
            (130, 128, True, torch.bfloat16, Reweight(power=3.0)),
            (300, 32, True, torch.bfloat16, Reweight(power=1.0)),
        ],
        {0, 2},
    ),
)
def test_lssar_attention(
    seqlen: int, head_dim: int, packed: bool, dtype: torch.dtype, reweight: Reweight | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    cu_seqlens = borders(seqlen) if packed else None
    assert_same_bits_by_descriptors(
        lambda *qkv: lssar_attention(*qkv, reweight=reweight, cu_seqlens=cu_seqlens, impl="triton"),
        half(seqlen, head_dim, dtype),
        monkeypatch,
        6 if reweight is None else 7,
    )


@pytest.mark.parametrize(
    ("dtype", "reweight", "slope"),
    tiered(
        [
            (torch.bfloat16, Reweight(), False),
            (torch.float16, Reweight(), True),
            (torch.float16, None, False),
        ],
        {0},
    ),
)
def test_lssar_of_a_block(dtype: torch.dtype, reweight: Reweight | None, slope: bool) -> None:
    # Queries and keys of two ranks: some queries see all keys, some a part, some none.
    numbers = torch.arange(260)
    band = Band(numbers[20:260:2], torch.where(numbers < 180, 0, 180)[20:260:2], numbers[40:190])
    q, dout = (torch.randn(2, 120, 4, 32, dtype=dtype, device=HERE) for _ in range(2))
    k, v = (torch.randn(2, 150, 2, 32, dtype=dtype, device=HERE) for _ in range(2))
    # Powers of ratios below 1 are fp16 numbers.
    stats = RowStats(*(torch.rand(4, 2, 4, 120, device=HERE) / 32))

    def results() -> list[Tensor]:
        total, top = LSSAR.sums(q, k, band)
        given = Threshold(total / 200, 1 / (1 + top))
        sums = LSSAR.fwd(q, k, v, band, given, reweight, slope)
        grads = LSSAR.bwd(dout, q, k, v, band, stats, reweight)
        return [total, top, *sums[:2], *(sums.slope or ()), *grads]

    with descriptors_set(False):
        expected = results()
    with descriptors_set(True):
        got = results()
    assert all(a.isfinite().all() and a.any() for a in got)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# Two descriptors of keys for each launch forward and for dq where fibres have a tile (64 here) and
# queries of branch and hop differ; two of rows for dk, dv, where no hop runs along.
@pytest.mark.parametrize(
    ("grid", "seqlen", "packed", "dtype", "count"),
    tiered(
        [
            # Branches over the block before too; the coarsest fibres are short.
            (ModeGrid((64,), local_blocks=2, hop_heads="kv"), 150, True, torch.float16, 8),
            # The coarsest fibres have 65 tokens, 2 apart; the others 2.
            (ModeGrid((2,), hop_heads="kv"), 130, False, torch.bfloat16, 6),
            # Hops over fibres of 64 tokens that are 2 apart.
            (ModeGrid((2, 64), hop_heads="kv"), 128, False, torch.bfloat16, 8),
            # Branch and hop in one sweep.
            (ModeGrid((64,)), 128, True, torch.bfloat16, 0),
            (ModeGrid((64,), hop_heads="kv"), 200, True, torch.bfloat16, 8),
        ],
        {0, 1},
    ),
)
def test_tensorized_attention(
    grid: ModeGrid,
    seqlen: int,
    packed: bool,
    dtype: torch.dtype,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cu_seqlens = None
    if packed:
        cu_seqlens = torch.tensor([0, grid.block, seqlen], dtype=torch.int32, device=HERE)
    assert_same_bits_by_descriptors(
        lambda *qkv: tensorized_attention(*qkv, grid=grid, cu_seqlens=cu_seqlens, impl="triton"),
        half(seqlen, 16, dtype),
        monkeypatch,
        count,
    )


def test_which_tensors_have_one() -> None:
    home = torch.zeros(2, 24, 4, 40, dtype=torch.float16)
    fitting = home[..., :32]
    unfit = {
        "float32": fitting.float(),
        "head_dim 40, a tile has 64": home,
        "odd head_dim of the storage": torch.zeros(2, 24, 4, 34).half()[..., :32],
        "begins inside of 16 bytes": home[..., 2:34],
        "features apart": fitting.transpose(2, 3).contiguous().transpose(2, 3),
        "one token for all": fitting[:, :1].expand(-1, 24, -1, -1),
    }
    with descriptors_set(True):
        assert use_descriptors(fitting, fitting[:, 1:])
        assert use_descriptors(fitting, step=4) and not use_descriptors(fitting, step=5)
        assert not {name for name, x in unfit.items() if use_descriptors(fitting, x)}
    assert not use_descriptors(fitting) or fitting.is_cuda
    (made,) = make_descriptors(16, fitting, step=4)
    assert (made.shape, made.block_shape) == ([2, 6, 4, 4, 32], [1, 16, 1, 1, 32])
    assert made.strides == [24 * 160, 4 * 160, 160, 40, 1]


@pytest.mark.parametrize(("capability", "wanted"), [(8, False), (9, True), (10, False)])
def test_which_gpus_use_them(
    capability: int, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    x = torch.zeros(1, 24, 4, 32, dtype=torch.float16)
    assert use_descriptors(x) is wanted
    monkeypatch.setattr(descriptors, "interpreting", lambda: True)
    assert not use_descriptors(x)
