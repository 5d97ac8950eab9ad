"""AttentionContext: its tables, their caches, and what a warm call may not do."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lcdist.attention import AttentionContext, HeadSlice
from lcdist.attention import context as module
from lcdist.config.schema import FullOptions
from lcdist.exchange import VirtualGroup
from lcdist.layout import KINDS, ContextLayout
from lcdist_kernels import Rotary, common
from lcdist_kernels.common import document_starts, read_borders
from tests.live import id_of

HEADS = HeadSlice(0, 2, 0, 2)
ROTARY = Rotary(10000.0 ** (-torch.arange(0, 8, 2) / 8))


def context(
    kind: str = "zigzag",
    *,
    seqlen: int = 64,
    cp_size: int = 4,
    rank: int = 1,
    cu_seqlens: Tensor | None = None,
    **more: Any,
) -> AttentionContext:
    layout, group = ContextLayout(kind, seqlen, cp_size), VirtualGroup(cp_size)[rank]
    return AttentionContext(
        FullOptions(), layout, group, ROTARY, cu_seqlens, 1.0, None, HEADS, "torch", **more
    )


def borders(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class LongTensors(TorchDispatchMode):
    """Counts new tensors of `length` elements or more; a view is not new."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.made = length, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.made += sum(
            isinstance(x, Tensor) and x.numel() >= self.length and id_of(x) not in known
            for x in tree_leaves(out)
        )
        return out


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_follow_layout_and_documents(kind: str, rank: int) -> None:
    cu_seqlens = borders(0, 5, 5, 40)
    ctx = context(kind, rank=rank, cu_seqlens=cu_seqlens)
    assert ctx.layout_key == (kind, 64, 4, rank)
    assert ctx.documents == (0, 5, 5, 40)
    for owner in (None, *range(4)):
        token_ids = ctx.layout.positions(rank if owner is None else owner)
        starts = document_starts(cu_seqlens, token_ids, 64)
        assert torch.equal(ctx.token_ids(owner), token_ids)
        assert torch.equal(ctx.starts(owner), starts)
        assert torch.equal(ctx.positions(owner), token_ids - starts)


def test_one_document_starts_at_zero() -> None:
    ctx = context()
    assert ctx.documents is None
    assert torch.equal(ctx.positions(2), ctx.token_ids(2))
    assert not ctx.starts(2).any()


def test_rotation_uses_the_positions_of_the_rank() -> None:
    ctx, x = context(cu_seqlens=borders(0, 7)), torch.randn(2, 16, 2, 8)
    assert ctx.rotary is not None
    for rank in (None, 3):
        assert torch.equal(ctx.rotate(x, rank), ctx.rotary.rotate(x, ctx.positions(rank)))


def test_explicit_positions_take_precedence() -> None:
    ids = torch.tensor([[3, 1], [0, 9]])
    ctx = context("contiguous", seqlen=2, cp_size=1, rank=0, position_ids=ids)
    assert torch.equal(ctx.positions(), ids)
    assert torch.equal(ctx.token_ids(), torch.tensor([0, 1]))


@pytest.mark.parametrize("cu_seqlens", [None, borders(0, 100, 3000)])
def test_a_warm_call_makes_no_tensor_of_the_sequence_length(cu_seqlens: Tensor | None) -> None:
    def tensors_made() -> tuple[int, int]:
        ctx = context(seqlen=seqlen, cu_seqlens=cu_seqlens)
        x = torch.randn(1, ctx.layout.local_seqlen, 1, 8)
        with LongTensors(ctx.layout.local_seqlen) as by_tables:
            for rank in (None, *range(4)):
                ctx.token_ids(rank), ctx.starts(rank), ctx.positions(rank)
        with LongTensors(ctx.layout.local_seqlen) as by_rotation:
            ctx.rotate(x)
        return by_tables.made, by_rotation.made

    seqlen = 4096 if cu_seqlens is None else 4104
    cold, warm = tensors_made(), tensors_made()
    assert cold[0] >= 8 and cold[1] > 1
    assert warm == (0, 1), "the rotated tensor alone is new"


def test_borders_are_read_once_per_tensor_and_again_after_a_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: list[Tensor] = []

    def counted(cu_seqlens: Tensor, *more: Any) -> tuple[int, ...]:
        reads.append(cu_seqlens)
        return read_borders(cu_seqlens, *more)

    monkeypatch.setattr(common, "read_borders", counted)
    cu_seqlens = borders(0, 5, 40)
    for _ in range(32):
        assert context(cu_seqlens=cu_seqlens).documents == (0, 5, 40)
    assert len(reads) == 1
    cu_seqlens[1] = 6
    assert context(cu_seqlens=cu_seqlens).documents == (0, 6, 40)
    # The same borders under a shorter layout are checked again.
    with pytest.raises(ValueError, match="at most at seqlen = 32"):
        _ = context(seqlen=32, cu_seqlens=cu_seqlens).documents


def test_tensors_of_inference_mode_are_read_every_time() -> None:
    with torch.inference_mode():
        cu_seqlens = borders(0, 5, 40)
        assert context(cu_seqlens=cu_seqlens).documents == (0, 5, 40)
        cu_seqlens[1] = 6
        assert context(cu_seqlens=cu_seqlens).documents == (0, 6, 40)


def test_tables_made_in_inference_mode_serve_training() -> None:
    size = {"seqlen": 72, "cu_seqlens": borders(0, 3)}
    with torch.inference_mode():
        context(**size).positions()
    ctx = context(**size)
    for table in (ctx.token_ids(), ctx.starts(), ctx.positions()):
        assert not table.is_inference() and not table.requires_grad
    x = torch.randn(1, 18, 1, 8, requires_grad=True)
    ctx.rotate(x).sum().backward()


def test_tables_of_a_device_are_kept_apart() -> None:
    ctx = context(seqlen=80)
    meta = torch.device("meta")
    assert ctx.positions(device=meta).device.type == "meta"
    assert ctx.positions(device=meta) is ctx.positions(device=meta)
    assert ctx.positions().device.type == "cpu"


def test_few_sets_of_tables_are_kept() -> None:
    first = context(cu_seqlens=borders(0, 1)).starts()
    for i in range(2, 2 + module.TABLE_SETS_KEPT):
        context(cu_seqlens=borders(0, i)).starts()
    assert context(cu_seqlens=borders(0, 1)).starts() is not first
    assert module._table_set.cache_info().currsize <= module.TABLE_SETS_KEPT


def test_threads_of_virtual_ranks_share_the_tables() -> None:
    layout, cu_seqlens = ContextLayout("striped", 96, 8), borders(0, 10, 50)
    wrong: list[int] = []
    ready = threading.Barrier(8)

    def check(group: Any) -> None:
        ctx = AttentionContext(
            FullOptions(), layout, group, None, cu_seqlens, 1.0, None, HEADS, "torch"
        )
        ready.wait()
        for owner in range(8):
            token_ids = layout.positions(owner)
            expected = token_ids - document_starts(cu_seqlens, token_ids, 96)
            if not torch.equal(ctx.positions(owner), expected):
                wrong.append(group.rank())

    VirtualGroup(8).run(check)
    assert not wrong
