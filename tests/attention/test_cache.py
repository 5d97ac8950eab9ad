"""Decoding caches: every call, on any number of ranks, gives the rows of the dense reference."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist.attention import METHODS
from lcdist.attention.cache import CacheSpec, LayerCache, NewTokens
from lcdist.attention.landmark.block_table import HostBlocks
from lcdist.config.schema import LandmarkOptions, LssarOptions, SccaOptions, TensorizedOptions
from lcdist.exchange import Group, VirtualGroup, group_size
from lcdist.inference.cache import cache_of
from tests.attention.body import Problem, Variant, make, whole
from tests.attention.test_methods import DECODING
from tests.kernels.helpers import FP32, HERE
from tests.tolerance import assert_matches

OTHERS = [
    Variant("tensorized", TensorizedOptions(modes=())),
    Variant("tensorized", TensorizedOptions(modes=(4,), local_blocks=3)),
    Variant("tensorized", TensorizedOptions(modes=(4,), local_blocks=1, pe="global")),
    Variant("tensorized", TensorizedOptions(modes=(2, 2, 3), local_blocks=1, hop_heads="kv")),
    Variant("landmark", LandmarkOptions(block_size=4, top_k=1, select_tokens=1)),
    Variant("scca", SccaOptions(pattern="fixed", chunk_size=6, wrap="fold", shift=12)),
    Variant("scca", SccaOptions(pattern="s2", chunk_size=6)),
    Variant("scca", SccaOptions(pattern="flow", chunk_size=6, wrap="mask")),
    Variant("lssar", LssarOptions(power=3, exempt_rows=2)),
]
CASES = [*DECODING, *OTHERS]
SHARDED = [variant for variant in CASES if variant.method.make_cache is not None]


def name_of(variant: Variant) -> str:
    words = [f"{value}".replace(" ", "") for value in vars(variant.options).values()]
    return "-".join([variant.name, *words])


def spec_of(problem: Problem, group: Group, **changes: Any) -> CacheSpec:
    """Return the description of a problem's layer."""
    q, k, _ = problem.qkv
    words = problem.keywords() | {"params": problem.params, "impl": "torch", "group": group}
    del words["cu_seqlens"]
    words["heads"] = problem.method._heads(q, k, problem.options, problem.params, None)
    return CacheSpec(**words, rows=len(q), capacity=q.shape[1], **changes)


def plan_of(cache: LayerCache, ends: list[int]) -> Iterator[NewTokens]:
    """Yield calls that read rows up to their ends: prefill row by row, then tokens of all rows."""
    unit, stops = group_size(cache.spec.group) * cache.page, []
    for row, end in enumerate(ends):
        stop, prompt = 0, end * 2 // 3
        if unit > cache.page:
            while stop + unit <= prompt:
                yield NewTokens((row,), (stop,), unit, sharded=True)
                stop += unit
        while stop < prompt:
            count = min(7 + row, prompt - stop)
            yield NewTokens((row,), (stop,), count)
            stop += count
        stops.append(stop)
    while any(stop < end for stop, end in zip(stops, ends, strict=True)):
        rows = tuple(i for i, end in enumerate(ends) if stops[i] < end)
        yield NewTokens(rows, tuple(stops[i] for i in rows), 1)
        for i in rows:
            stops[i] += 1


@torch.no_grad()
def read(problem: Problem, ends: list[int], group: Group, **changes: Any) -> tuple[Tensor, Any]:
    """Return what a rank computes of all rows' tokens, 0 elsewhere, and its cache."""
    cache = cache_of(problem.method, spec_of(problem, group, **changes))
    out = torch.zeros_like(problem.qkv[0])
    for new in plan_of(cache, ends):
        own, rows = new.own(group), torch.tensor(new.rows)[:, None]
        q, k, v = (x[rows, own] for x in problem.qkv)
        out[rows, own] = cache.attend(q, k, v, new)
    return out, cache


def expected(problem: Problem, ends: list[int]) -> Tensor:
    """Return the reference's output of the rows up to their ends, 0 from there on."""
    out = whole(problem)[0]
    for row, end in enumerate(ends):
        out[row, end:] = 0
    return out


@pytest.mark.parametrize("variant", CASES, ids=name_of)
def test_calls_of_any_size_equal_the_reference(variant: Variant) -> None:
    problem = make(variant, variant.kinds[0], 1, at_least=60)
    ends = [problem.layout.seqlen, problem.layout.seqlen - 11]
    assert_matches(read(problem, ends, None)[0], expected(problem, ends))


@pytest.mark.parametrize("variant", SHARDED, ids=name_of)
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_a_cache_over_ranks_equals_the_reference(variant: Variant, ranks: int) -> None:
    problem = make(variant, variant.kinds[0], 1, at_least=200)
    ends = [problem.layout.seqlen, problem.layout.seqlen - 11]
    outs = VirtualGroup(ranks).run(lambda group: read(problem, ends, group)[0])
    # Tokens of a sharded call are computed on one rank, all others on all ranks, with equal bits.
    joined = torch.zeros_like(outs[0])
    for out in outs:
        both = (joined != 0) & (out != 0)
        assert torch.equal(joined[both], out[both])
        joined = torch.where(out == 0, joined, out)
    assert any((out == 0).all(2).all(2).sum() > 11 for out in outs), "no call was sharded"
    assert_matches(joined, expected(problem, ends))


def test_scca_keeps_only_what_its_patterns_still_see() -> None:
    chunk = 8
    for options, most in (
        (SccaOptions(pattern="fixed", chunk_size=chunk), 1.5 * chunk),
        (SccaOptions(pattern="flow", chunk_size=chunk), 4 * chunk),
        (SccaOptions(pattern="sda", dilation=2), 128),
    ):
        problem = make(Variant("scca", options), "contiguous", 1, at_least=128, heads=(4, 4))
        cache: Any = read(problem, [128, 128], None)[1]
        cache = cache_of(problem.method, spec_of(problem, None))
        held = []
        for t in range(128):
            new = NewTokens((0, 1), (t, t), 1)
            cache.attend(*(x[:, t : t + 1] for x in problem.qkv), new)
            held.append(max(group.store.length(0) for group in cache._groups))
        assert max(held) <= most, options.pattern
        assert max(held) > most / 2, options.pattern


def test_bytes_of_the_caches() -> None:
    def nbytes(name: str, **words: Any) -> int:
        problem = make(Variant(name, METHODS[name].options(**words)), "contiguous", 1, at_least=120)
        ends = [problem.layout.seqlen] * 2
        return read(problem, ends, None)[1].nbytes

    full = nbytes("full")
    assert full == 2 * 120 * 2 * 2 * 16 * 8
    assert nbytes("coca") == full * 3 // 4, "tau is half a key"
    assert nbytes("lssar") == full
    # U has as many heads as hops have: those of queries, or of keys.
    by_key_head = nbytes("tensorized", modes=(4,), local_blocks=1, hop_heads="kv")
    assert full < by_key_head < 1.1 * full
    assert nbytes("tensorized", modes=(4,), local_blocks=1) > 1.5 * full


@pytest.mark.parametrize("ranks", [1, 2])
def test_blocks_in_host_memory_give_the_same_bits(ranks: int) -> None:
    options = LandmarkOptions(block_size=4, top_k=3, select_tokens=1)
    problem = make(Variant("landmark", options), "contiguous", 1, at_least=160)
    ends = [160, 149]

    def both(group: Group) -> tuple[Tensor, Tensor, Any, Any]:
        out, cache = read(problem, ends, group)
        hosted, host_cache = read(problem, ends, group, device_blocks=4)
        return out, hosted, cache, host_cache

    for out, hosted, cache, host_cache in VirtualGroup(ranks).run(both):
        assert torch.equal(out, hosted)
        count = host_cache.swaps
        assert 0 < count.copied < count.chosen, "some chosen blocks were there already"
        assert count.bytes_copied == count.copied * 2 * 4 * 16 * 8
        assert host_cache.blocks.nbytes == 2 * 2 * 4 * 2 * 4 * 16 * 8
        assert host_cache.nbytes < cache.nbytes


def test_blocks_that_are_expected_are_copied_ahead() -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 8 * 4, 2, 3, generator=generator)
    blocks = HostBlocks(1, 8, 4)
    blocks.append(0, torch.arange(8), k, v)

    def find(*numbers: int) -> Tensor:
        """Return the keys that a query of each of two key heads reads in these blocks."""
        [found] = blocks.find(0, of_both_heads(*numbers))
        return found.table[found.ids[0, :, 0].long()][:, :, 0]

    def of_both_heads(*numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32).expand(1, 2, 1, -1)

    def counts() -> tuple[int, int]:
        return blocks.swaps.copied, blocks.swaps.posted

    find(0, 1)
    assert counts() == (4, 0)
    blocks.expect(0, of_both_heads(1, 2, 3, 4))
    blocks.post()
    # Two places are left beside the blocks that the last call needed.
    assert counts() == (4, 4)
    keys = k[0].unflatten(0, (8, 4)).permute(2, 0, 1, 3)
    assert torch.equal(find(2, 3), keys[:, [2, 3]]) and counts() == (4, 4)
    # A wrong expectation takes no place of the last choice, and changes no result.
    blocks.expect(0, of_both_heads(5, 6, 7))
    blocks.post()
    assert torch.equal(find(2, 3), keys[:, [2, 3]]) and counts() == (4, 8)
    assert torch.equal(find(0, 4), keys[:, [0, 4]]) and counts() == (8, 8)
    # Nor does one that is right in part: 2 and 3 are there, and no place is left for 6 and 7.
    blocks.expect(0, of_both_heads(2, 3, 6, 7))
    blocks.post()
    assert torch.equal(find(0, 4), keys[:, [0, 4]]) and counts() == (8, 8)
    assert blocks.swaps.bytes_copied == 16 * 2 * 4 * 3 * 4


def test_bytes_on_the_device_do_not_grow_with_the_text() -> None:
    options = LandmarkOptions(block_size=4, top_k=2, select_tokens=1)

    def held(tokens: int) -> tuple[int, int]:
        problem = make(Variant("landmark", options), "contiguous", 1, at_least=tokens)
        cache: Any = read(problem, [tokens] * 2, None, device_blocks=4)[1]
        return cache.blocks.nbytes, cache.landmarks.nbytes

    (blocks, landmarks), (more_blocks, more_landmarks) = held(80), held(320)
    assert blocks == more_blocks and more_landmarks == 4 * landmarks


@pytest.mark.parametrize("variant", SHARDED, ids=name_of)
def test_a_rank_without_tokens_of_one_row_reads_nothing(variant: Variant) -> None:
    problem = make(variant, variant.kinds[0], 1, at_least=60)
    ends = (40, 2)

    def next_tokens(group: Group) -> Tensor:
        cache = cache_of(problem.method, spec_of(problem, group))
        for row, end in enumerate(ends):
            q, k, v = (x[row : row + 1, :end] for x in problem.qkv)
            cache.attend(q, k, v, NewTokens((row,), (0,), end))
        rows, positions = torch.arange(2)[:, None], torch.tensor(ends)[:, None]
        q, k, v = (x[rows, positions] for x in problem.qkv)
        return cache.attend(q, k, v, NewTokens((0, 1), ends, 1))

    truth = whole(problem)[0][[0, 1], ends][:, None]
    for out in VirtualGroup(2).run(next_tokens):
        assert_matches(out, truth)


def test_more_tokens_than_the_capacity_are_refused() -> None:
    problem = make("full", "contiguous", 1)
    cache = cache_of(problem.method, spec_of(problem, None))
    count = problem.layout.seqlen
    q, k, v = (x[:1] for x in problem.qkv)
    cache.attend(q, k, v, NewTokens((0,), (0,), count))
    with pytest.raises(ValueError, match=f"{count + 1} tokens do not fit a cache of {count}"):
        cache.attend(q[:, :1], k[:, :1], v[:, :1], NewTokens((0,), (count,), 1))


@pytest.mark.parametrize(
    "variant",
    [
        Variant("full", METHODS["full"].options()),
        Variant("tensorized", TensorizedOptions(modes=(4,), local_blocks=2)),
        Variant("landmark", LandmarkOptions(block_size=4, top_k=2, select_tokens=1)),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_kernels_of_single_tokens_equal_torch(variant: Variant, ranks: int) -> None:
    problem = make(variant, "contiguous", 1, at_least=48, dtype=torch.float32)
    problem.qkv = [x.to(HERE) for x in problem.qkv]
    if problem.params is not None:
        problem.params = {name: x.to(HERE) for name, x in problem.params.items()}

    def last_tokens(group: Group, impl: str) -> Tensor:
        spec = dataclasses.replace(spec_of(problem, group), impl="torch")
        cache = cache_of(problem.method, spec)
        q, k, v = (x[:, :40] for x in problem.qkv)
        for row in range(2):
            new = NewTokens((row,), (0,), 40)
            cache.attend(q[row : row + 1], k[row : row + 1], v[row : row + 1], new)
        cache.spec = dataclasses.replace(spec, impl=impl)
        out = []
        for t in range(40, 47):
            q, k, v = (x[:, t : t + 1] for x in problem.qkv)
            out.append(cache.attend(q, k, v, NewTokens((0, 1), (t, t), 1)))
        return torch.cat(out, 1)

    for impl in ("torch", "triton"):
        outs = VirtualGroup(ranks).run(lambda group, impl=impl: last_tokens(group, impl))
        if impl == "torch":
            truth = outs[0]
        for out in outs:
            assert_matches(out, truth, FP32)
