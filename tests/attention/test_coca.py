"""CoCA under context parallelism: the strict variant too, tau on the wire, a cache of t."""

import dataclasses

import pytest
import torch
from torch import Tensor

from lcdist.attention import METHODS, HeadSlice, Shape, Traffic
from lcdist.config.schema import CocaOptions
from lcdist.exchange import Group, VirtualGroup
from lcdist.layout import KINDS, ContextLayout
from tests.attention.body import (
    Problem,
    assert_all_match,
    joined,
    make,
    on_a_rank,
    on_virtual_ranks,
    whole,
)
from tests.distributed import run_ranks

METHOD = METHODS["coca"]
STRICT = CocaOptions(variant="strict")


def strict(kind: str, cp_size: int, **asked) -> Problem:
    return dataclasses.replace(make("coca", kind, cp_size, **asked), options=STRICT)


# The shared body runs the default, slack.
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_strict_on_virtual_ranks_equals_reference(kind: str, cp_size: int, packed: bool) -> None:
    problem = strict(kind, cp_size, packed=packed)
    truth = whole(problem)
    for impl in ("reference", "torch", "auto"):
        assert_all_match(on_virtual_ranks(problem, impl)[0], truth)


@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (8, 2), (8, 1)])
def test_strict_with_grouped_heads(heads: tuple[int, int]) -> None:
    problem = strict("zigzag", 3, heads=heads, packed=True)
    for impl in ("reference", "torch"):
        assert_all_match(on_virtual_ranks(problem, impl)[0], whole(problem))


def strict_on_a_rank(rank: int, world_size: int, problem: Problem) -> list[Tensor]:
    group: Group = torch.distributed.group.WORLD
    return on_a_rank(problem, group, "torch")[0]


def test_strict_on_processes_equals_reference() -> None:
    problem = strict("zigzag", 3, packed=True)
    shards = run_ranks(strict_on_a_rank, 3, problem)
    assert_all_match(joined(problem, shards), whole(problem))


@pytest.mark.parametrize(("itemsize", "grad_size"), [(2, 4), (4, 4), (8, 8)])
def test_bytes_by_hand(itemsize: int, grad_size: int) -> None:
    shape = Shape(batch=1, nheads=4, nheads_kv=2, head_dim=8, itemsize=itemsize)
    block = 1 * 6 * 2 * (4 + 8)
    layout = ContextLayout("contiguous", 18, 3)
    counted = METHOD.bytes(CocaOptions(), shape, layout)
    assert counted == Traffic(
        (2 * block * itemsize,) * 3, (2 * block * itemsize + 3 * block * grad_size,) * 3
    )
    full = METHODS["full"].bytes(METHODS["full"].options(), shape, layout)
    for mine, keys_and_values in zip(counted, full, strict=True):
        assert [4 * sent for sent in mine] == [3 * sent for sent in keys_and_values]
    assert METHOD.bytes(STRICT, shape, ContextLayout("zigzag", 18, 1)) == Traffic((0,), (0,))


def test_flops_are_those_of_full_attention() -> None:
    shape = Shape(batch=2, nheads=3, nheads_kv=1, head_dim=6, itemsize=2, seqlen=4)
    assert METHOD.flops(STRICT, shape) == 2 * 3 * 10 * (6 + 6) * 2
    with pytest.raises(ValueError, match="seqlen"):
        METHOD.flops(STRICT, dataclasses.replace(shape, seqlen=None))


def test_half_precision_comes_back_in_half_precision() -> None:
    problem = strict("zigzag", 2, dtype=torch.float16)
    for impl in ("reference", "torch", "auto"):
        assert all(x.dtype == torch.float16 for x in on_virtual_ranks(problem, impl)[0])


def test_a_rank_saves_q_its_block_out_and_lse_alone() -> None:
    problem = make("coca", "zigzag", 2, at_least=512)

    def saved_by(group: Group) -> int:
        saved: dict[int, int] = {}

        def count(x: Tensor) -> Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        mine = [problem.layout.shard(x, 0, 1).requires_grad_() for x in problem.qkv]
        asked = problem.asked() | {"layout": problem.layout, "group": group, "impl": "torch"}
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            METHOD.attention(*mine, **asked)
        return sum(saved.values())

    batch, local, nheads, nheads_kv, head_dim = 2, 256, 4, 2, 16
    elements = nheads * (2 * head_dim + 1) + nheads_kv * (head_dim + head_dim // 2)
    assert VirtualGroup(2).run(saved_by) == 2 * [8 * batch * local * elements]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_one_token_each(kind: str) -> None:
    problem = make("coca", kind, 3)
    length = problem.layout.seqlen
    problem.cu_seqlens = torch.arange(length + 1, dtype=torch.int32)
    for impl in ("reference", "torch"):
        out, dq, dt, dv = on_virtual_ranks(problem, impl)[0]
        groups = problem.dout.unflatten(2, (2, 2)).sum(3)
        assert_all_match([out, dv], [problem.qkv[2].repeat_interleave(2, 2), groups])
        assert dq.abs().max() < 1e-12 and dt.abs().max() < 1e-12


def test_one_token_a_rank() -> None:
    for kind in ("contiguous", "striped"):
        problem = make("coca", kind, 8, at_least=1)
        for impl in ("reference", "torch"):
            assert_all_match(on_virtual_ranks(problem, impl)[0], whole(problem))


@pytest.mark.parametrize("options", [CocaOptions(), STRICT])
def test_decode_with_both_variants_over_a_cache_of_t(options: CocaOptions) -> None:
    problem = dataclasses.replace(make("coca", "contiguous", 1), options=options)
    q, t, v = problem.qkv
    asked = {key: value for key, value in problem.asked().items() if key != "cu_seqlens"}
    n = q.shape[1]
    # What lies beyond the greatest position is not read.
    room = torch.full_like(t[:, :5], torch.nan)
    caches = [torch.cat((x, room), 1) for x in (t, v)]
    got = METHOD.decode(q[:, n - 6 :], *caches, positions=torch.arange(n - 6, n), **asked)
    assert_all_match([got], [whole(problem)[0][:, n - 6 :]])


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_what_it_cannot_do_is_refused(impl: str) -> None:
    problem = make("coca", "contiguous", 1)
    call = problem.asked() | {"layout": problem.layout, "group": None, "impl": impl}
    with pytest.raises(ValueError, match="8 frequencies"):
        METHOD.attention(*(x[..., :8] for x in problem.qkv), **call)
    odd = [x[..., :15] for x in problem.qkv]
    with pytest.raises(ValueError, match="head_dim = 15.*even"):
        METHOD.attention(*odd, **(call | {"rotary": None}))
    with pytest.raises(ValueError, match="'tied'.*slack, strict"):
        METHOD.attention(*problem.qkv, **(call | {"options": CocaOptions(variant="tied")}))  # pyright: ignore[reportArgumentType]
    heads = HeadSlice(first=0, nheads=4, first_kv=0, nheads_kv=2)
    out = METHOD.attention(*problem.qkv, **(call | {"heads": heads}))
    assert_all_match([out], [METHOD.reference(*problem.qkv, **problem.asked())])
