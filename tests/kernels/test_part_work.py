"""Parts over a tensor of keys by one launch: against tiled torch, merged, added, and counted."""

from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist_kernels.common import document_starts
from lcdist_kernels.descriptors import descriptors_set
from lcdist_kernels.full import TORCH_IMPL, TRITON_IMPL, piece_kernel
from lcdist_kernels.scca import Part, Parts, Rule, banded_bwd, banded_fwd, head_groups, window_parts
from lcdist_kernels.scca.part_work import Sizes, work_of_parts
from tests.kernels.helpers import HERE, assert_close
from tests.kernels.test_full import borders
from tests.kernels.tiers import covering, one, tiered

ALL = slice(None)
SEQLEN, SCALE = 75, 0.3
# Of four key heads with two query heads each: shared by heads, by every other one, and single.
RULES = (
    *(Rule("chunk", 16), Rule("fold", 16, 48)) * 2,
    *(Rule("split", 17, 9),) * 2,
    *(Rule("chunk", 17, 30), Rule("chunk", 16)),
)


def parts_over(rules: tuple[Rule, ...], k_idx: Tensor, packed: bool) -> Parts:
    """Return what each token sees of the keys k_idx under window rules."""
    index = torch.arange(SEQLEN)
    starts = document_starts(borders(SEQLEN) if packed else None, index, SEQLEN)
    return Parts(
        part
        for heads in head_groups(rules, 4)
        for members, rule in heads.members
        for part in window_parts(
            rule, (heads.kv, heads.kv, members), index, starts, k_idx, TRITON_IMPL
        )
    )


def inputs(*lengths: int, nheads_k: int = 4) -> list[Tensor]:
    """Return q, dout, and k and v of each length, in fp32."""
    q, dout = (torch.randn(2, SEQLEN, 4, 2, 16, device=HERE) for _ in range(2))
    return [q, dout, *(torch.randn(2, n, nheads_k, 16, device=HERE) for n in lengths for _ in "kv")]


def both(inputs: list[Tensor], parts: list[Parts], impl: Any) -> list[Tensor]:
    """Return out, lse, dq and each tensor's dk and dv of queries over several tensors of keys."""
    q, dout, *kv = inputs
    tensors = list(zip(kv[::2], kv[1::2], parts, strict=True))
    partial = None
    for k, v, own in tensors:
        partial = banded_fwd(q, k, v, own, SCALE, partial, impl=impl)
    assert partial is not None
    out, lse = partial
    dq = torch.zeros_like(q, dtype=lse.dtype)
    grads = [
        grad
        for k, v, own in tensors
        for grad in banded_bwd(dout, q, k, v, (out, lse), own, dq, SCALE, impl=impl)
    ]
    return [out, lse.masked_fill(lse == -torch.inf, -99.0), dq, *grads]


@pytest.mark.parametrize(
    ("cut", "packed"), covering(one(["one", "halves", "strided"]), one([True, False]))
)
def test_windows_over_several_tensors_of_keys(cut: str, packed: bool) -> None:
    index = torch.arange(SEQLEN)
    cuts = {"one": [index], "halves": [index[20:60], torch.cat((index[:20], index[60:]))]}
    k_idx = cuts.get(cut, [index[i::3].contiguous() for i in range(3)])
    given = inputs(*map(len, k_idx))
    parts = [parts_over(RULES, each, packed) for each in k_idx]
    # Tiled torch joins chunks: its parts are others.
    got, truth = both(given, parts, TRITON_IMPL), both(given, parts, TORCH_IMPL)
    assert_close(got, truth)


def test_descriptors_change_no_bit() -> None:
    index = torch.arange(SEQLEN)
    given = [x.half() for x in inputs(40, 35)]
    parts = [parts_over(RULES, each, True) for each in (index[:40], index[40:])]
    results = []
    for on in (False, True):
        with descriptors_set(on):
            results.append(both(given, parts, TRITON_IMPL))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(("number", "group"), tiered([(4, 2), (8, 1), (1, 8)], {0}))
def test_queries_that_are_columns_are_read_where_they_are(
    number: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, kernels = [], ("_pieces_fwd_kernel", "_pieces_bwd_dq_kernel", "_pieces_bwd_dkv_kernel")
    for name in kernels:
        kernel = getattr(piece_kernel, name)

        class Spy:
            def __getitem__(self, grid: tuple[int, int], kernel=kernel) -> Any:
                def launch(q: Tensor, *args: Any, **words: Any) -> None:
                    read.append(q.untyped_storage().data_ptr())
                    kernel[grid](q, *args, **words)

                return launch

        monkeypatch.setattr(piece_kernel, name, Spy())
    index = torch.arange(SEQLEN)
    columns = torch.randn(2, SEQLEN, number, group + 2, 16, device=HERE)
    q, k, v = columns.split([group, 1, 1], 3)
    dout = torch.randn(2, SEQLEN, number, group, 16, device=HERE)
    parts = Parts(
        window_parts(Rule("chunk", 16), (ALL, ALL, ALL), index, 0 * index, index, TRITON_IMPL)
    )
    kv = [k.squeeze(3), v.squeeze(3)]
    got = both([q, dout, *kv], [parts], TRITON_IMPL)
    assert read == [columns.untyped_storage().data_ptr()] * 3
    apart = both([q.contiguous(), dout, *kv], [parts], TRITON_IMPL)
    assert all(map(torch.equal, got, apart))
    assert_close(got, both([q, dout, *kv], [parts], TORCH_IMPL))


def some_parts() -> Parts:
    """Return parts of strided rows and keys, of some heads of a tensor with three key heads."""
    index = torch.arange(SEQLEN)
    rows, keys = index[2::4], torch.arange(1, 40, 2)
    made = [
        # Key heads 0 and 2 are read by the second query heads of 1 and 3.
        Part(slice(2, None, 4), slice(1, 40, 2), slice(1, 4, 2), slice(0, 3, 2), slice(1, 2),
             rows, 0 * rows, 3 * torch.arange(len(keys))),
        Part(slice(3, 50, 4), ALL, slice(1, 4, 2), slice(0, 3, 2), slice(1, 2),
             index[3:50:4], index[3:50:4] - 9, index[:40] + 2),
        # Keys that no query sees, and a head that sees the last key alone.
        Part(ALL, slice(0, 5), slice(0, 1), slice(1, 2), slice(0, 1),
             index - 80, 0 * index, torch.arange(5)),
        Part(ALL, slice(39, None), slice(0, 1), slice(1, 2), slice(1, 2),
             index, 0 * index, torch.tensor([30])),
    ]  # fmt: skip
    return Parts(made)


def test_parts_of_some_heads_rows_and_keys() -> None:
    given, parts = inputs(40, nheads_k=3), some_parts()
    assert_close(both(given, [parts], TRITON_IMPL), both(given, [parts], TORCH_IMPL))
    work = work_of_parts(parts, Sizes(SEQLEN, 4, 2, 40, 3), all_rows=True)
    for rule in range(len(work.q_lo)):
        owned = torch.zeros(SEQLEN, dtype=torch.int64)
        for piece in work.pieces:
            if piece.rule == rule:
                owned[list(piece.rows)] += 1
        assert torch.all(owned == 1)


@pytest.mark.parametrize("parts", [Parts(), Parts(some_parts()[2:3])])
def test_nothing_to_see(parts: Parts) -> None:
    q, dout, k, v = inputs(40, nheads_k=3)
    out, lse = banded_fwd(q, k, v, parts, SCALE, impl=TRITON_IMPL)
    assert torch.all(out == 0) and torch.all(lse == -torch.inf)
    kept = torch.randn_like(out), torch.randn_like(lse)
    before = [x.clone() for x in kept]
    assert banded_fwd(q, k, v, parts, SCALE, kept, impl=TRITON_IMPL) == kept
    dq = torch.randn_like(q)
    dk, dv = banded_bwd(dout, q, k, v, kept, parts, same := dq.clone(), SCALE, impl=TRITON_IMPL)
    assert torch.all(dk == 0) and torch.all(dv == 0) and torch.equal(same, dq)
    assert all(map(torch.equal, kept, before))


def test_one_launch_forward_and_two_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    launched, number = [], count()
    kernels = ("_pieces_fwd_kernel", "_pieces_bwd_dq_kernel", "_pieces_bwd_dkv_kernel")
    for name in kernels:
        kernel = getattr(piece_kernel, name)

        class Spy:
            def __getitem__(self, grid: tuple[int, int], name=name, kernel=kernel) -> Any:
                launched.append((next(number), name))
                return kernel[grid]

        monkeypatch.setattr(piece_kernel, name, Spy())
    index = torch.arange(SEQLEN)
    parts = [parts_over(RULES, each, True) for each in (index[:40], index[40:])]
    assert min(map(len, parts)) > 3
    both(inputs(40, 35), parts, TRITON_IMPL)
    order = [0, 0, 1, 2, 1, 2]
    assert [name for _, name in launched] == [kernels[i] for i in order]
