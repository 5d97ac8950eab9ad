"""What every attention method keeps, whatever it computes: one body, parametrized by METHODS."""

import dataclasses
from math import lcm
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist.attention import METHODS, HeadSlice, Shape
from lcdist.exchange import VirtualGroup, traffic
from lcdist.exchange.virtual import VirtualRank
from lcdist.layout import KINDS, ContextLayout, pieces_needed
from tests.attention.body import (
    Problem,
    Variant,
    assert_all_match,
    joined,
    make,
    on_a_rank,
    on_virtual_ranks,
    variants,
    whole,
)
from tests.distributed import run_ranks
from tests.tolerance import relative_error

VARIANTS = variants()
LAYOUTS = [pytest.param(v, kind, id=f"{v}-{kind}") for v in VARIANTS for kind in v.kinds]
DECODING = [variant for variant in VARIANTS if "decode" in variant.method.supports]
NAMES = list(METHODS)
IMPLS = ["reference", "torch", "auto"]
# On more ranks than one "auto" is another name for a built implementation.
RUNS = [(cp, impl) for cp in (1, 2, 3, 4, 5, 6, 8) for impl in IMPLS if cp == 1 or impl != "auto"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("cp_size", "impl"), RUNS)
@pytest.mark.parametrize(("variant", "kind"), LAYOUTS)
def test_on_virtual_ranks_equals_reference(
    variant: Variant, kind: str, cp_size: int, packed: bool, impl: str
) -> None:
    problem = make(variant, kind, cp_size, packed=packed)
    assert_all_match(on_virtual_ranks(problem, impl)[0], whole(problem))


@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_grouped_heads(variant: Variant, heads: tuple[int, int]) -> None:
    problem = make(variant, variant.kinds[0], 3, heads=heads)
    for impl in ("reference", "torch"):
        assert_all_match(on_virtual_ranks(problem, impl)[0], whole(problem))


def every_problem(
    rank: int, world_size: int, problems: list[tuple[Problem, str]]
) -> list[list[Tensor]]:
    group = torch.distributed.group.WORLD
    return [on_a_rank(problem, group, impl)[0] for problem, impl in problems]


@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_on_processes_equals_reference(cp_size: int) -> None:
    problems = [
        (make(variant, kind, cp_size, packed="varlen" in variant.method.supports), impl)
        for variant in VARIANTS
        for kind in variant.kinds
        for impl in ("reference", "torch")
    ]
    ranks = run_ranks(every_problem, cp_size, problems)
    for (problem, _), *shards in zip(problems, *ranks, strict=True):
        assert_all_match(joined(problem, shards), whole(problem))


@pytest.mark.parametrize(("cp_size", "impl"), [run for run in RUNS if run[0] in (1, 4)])
@pytest.mark.parametrize(("variant", "kind"), LAYOUTS)
def test_no_output_knows_the_future(variant: Variant, kind: str, cp_size: int, impl: str) -> None:
    problem = make(variant, kind, cp_size)
    before = on_virtual_ranks(problem, impl)[0][0]
    for t in (1, 17, problem.layout.seqlen - 2):
        for i, x in enumerate(problem.qkv):
            changed = x.clone()
            changed[:, t:] = torch.randn_like(changed[:, t:])
            qkv = [*problem.qkv[:i], changed, *problem.qkv[i + 1 :]]
            out = on_virtual_ranks(dataclasses.replace(problem, qkv=qkv), impl)[0][0]
            assert torch.equal(out[:, :t], before[:, :t])
            assert not torch.equal(out[:, t:], before[:, t:])


@pytest.mark.parametrize(("cp_size", "impl"), [run for run in RUNS if run[0] in (1, 4)])
@pytest.mark.parametrize(("variant", "kind"), LAYOUTS)
def test_nothing_leaks_between_documents(
    variant: Variant, kind: str, cp_size: int, impl: str
) -> None:
    problem = make(variant, kind, cp_size, packed=True)
    assert problem.cu_seqlens is not None
    start, stop = problem.cu_seqlens[-3:-1].tolist()
    assert start < stop
    inside = torch.zeros(problem.layout.seqlen, dtype=torch.bool)
    inside[start:stop] = True
    before = on_virtual_ranks(problem, impl)[0]
    changed = [x.where(~inside[:, None, None], torch.randn_like(x)) for x in problem.qkv]
    dout = problem.dout.where(~inside[:, None, None], torch.randn_like(problem.dout))
    after = on_virtual_ranks(dataclasses.replace(problem, qkv=changed, dout=dout), impl)[0]
    for a, b in zip(after[:4], before[:4], strict=True):
        assert torch.equal(a[:, ~inside], b[:, ~inside])
        assert not torch.equal(a[:, inside], b[:, inside])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("cp_size", [1, 2, 5])
@pytest.mark.parametrize(("variant", "kind"), LAYOUTS)
def test_bytes_are_those_on_the_wire(
    variant: Variant, kind: str, cp_size: int, dtype: torch.dtype
) -> None:
    problem = make(variant, kind, cp_size, dtype=dtype)
    shape = Shape(batch=2, nheads=4, nheads_kv=2, head_dim=16, itemsize=dtype.itemsize)
    expected = problem.method.bytes(problem.options, shape, problem.layout)
    sent = on_virtual_ranks(problem, "torch")[1]
    if getattr(problem.options, "top_k", None) is None:
        assert sent == expected
    else:  # What is chosen depends on the values: `bytes` is the most it can be.
        for counted, most in zip(sent, expected, strict=True):
            assert all(a <= b for a, b in zip(counted, most, strict=True))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_verbs_are_those_on_the_wire(variant: Variant) -> None:
    problem = make(variant, variant.kinds[0], 3)

    def verbs(rank: VirtualRank) -> set[str]:
        with traffic() as counted:
            on_a_rank(problem, rank, "torch")
        return {verb for verb, sent in counted.sent.items() if sent}

    used = set().union(*VirtualGroup(3).run(verbs))
    assert used == set(variant.method.exchange_for(variant.options)) <= set(variant.method.exchange)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_error_in_bf16_does_not_grow_with_the_number_of_ranks(variant: Variant) -> None:
    kind = variant.kinds[0]
    fine = make(variant, kind, 64, at_least=512, dtype=torch.bfloat16)
    wide = dataclasses.replace(fine, qkv=[x.double() for x in fine.qkv], dout=fine.dout.double())
    # Un-rotated: bf16 rotation has an error of its own that no number of ranks changes.
    truth = whole(dataclasses.replace(wide, inv_freq=None))
    errors = {}
    for cp_size in (2, 8, 64):
        layout = dataclasses.replace(fine.layout, cp_size=cp_size)
        problem = dataclasses.replace(fine, layout=layout, inv_freq=None)
        got = on_virtual_ranks(problem, "torch")[0]
        errors[cp_size] = [relative_error(a, r) for a, r in zip(got, truth, strict=True)]
    for two, eight, many in zip(*errors.values(), strict=True):
        assert eight < 1.2 * two and many < 1.2 * two, errors


@pytest.mark.parametrize("name", NAMES)
def test_the_contract(name: str) -> None:
    method = METHODS[name]
    options = method.options()
    assert method.name == name and method.options.__dataclass_params__.frozen
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.name = "other"  # pyright: ignore[reportAttributeAccessIssue]
    assert set(method.layouts_for(options)) <= set(method.layouts) <= set(KINDS)
    assert set(method.exchange) <= {"ring", "shift", "gather", "swap"} and method.exchange
    assert method.supports <= {"gqa", "varlen", "decode", "dense", "landmarks", "state"}
    for kind in method.layouts_for(options):
        for cp_size in (1, 2, 3):
            step = method.multiple_of(options, cp_size, kind)
            fits = lcm(step, pieces_needed(kind, cp_size))
            assert ContextLayout(kind, fits, cp_size, step).multiple_of == step
    sizes = {key: tuple(value.shape) for key, value in method.initial(options, 8).items()}
    assert sizes == dict(method.parameters(options, 8))
    assert all(size[-1] == 8 for size in sizes.values())


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_wrong_calls_are_refused_before_anything_is_sent(variant: Variant) -> None:
    problem = make(variant, variant.kinds[0], 2)
    method, layout = problem.method, problem.layout
    shards = [layout.shard(x, 0, 1) for x in problem.qkv]
    group = VirtualGroup(2)[0]
    asked = {"options": problem.options, "layout": layout, "group": group}
    for change, says in [
        ({"impl": "cuda"}, "impl = 'cuda'"),
        ({"group": None}, "cp_size = 2, the group has 1"),
        ({"group": VirtualGroup(3)[0]}, "cp_size = 2, the group has 3"),
        ({"layout": dataclasses.replace(layout, seqlen=2 * layout.seqlen)}, "every rank"),
        ({"params": {"unheard_of": torch.zeros(1)}}, "unheard_of"),
    ]:
        with pytest.raises(ValueError, match=says):
            method.attention(*shards, **(asked | change))


@pytest.mark.parametrize("variant", DECODING, ids=str)
@pytest.mark.parametrize("step", [1, 7])
def test_decode_token_by_token_equals_reference(variant: Variant, step: int) -> None:
    problem = make(variant, variant.kinds[0], 1)
    q, k, v = problem.qkv
    out = whole(problem)[0]
    asked = decode_arguments(problem)
    room = torch.full_like(k, torch.nan)
    k_cache, v_cache = torch.cat([k, room], 1), torch.cat([v, room], 1)
    got = []
    for positions in torch.arange(q.shape[1]).split(step):
        got.append(
            problem.method.decode(q[:, positions], k_cache, v_cache, positions=positions, **asked)
        )
    assert_all_match([torch.cat(got, 1)], [out])


def decode_arguments(problem: Problem) -> dict[str, Any]:
    asked = problem.asked() | {"params": problem.params}
    del asked["cu_seqlens"]
    return asked | ({"state": {}} if "state" in problem.method.supports else {})


@pytest.mark.parametrize(
    "variant", [v for v in DECODING if "state" not in v.method.supports], ids=str
)
def test_decode_rows_of_different_lengths(variant: Variant) -> None:
    problem = make(variant, variant.kinds[0], 1)
    q, k, v = problem.qkv
    asked = decode_arguments(problem)
    positions = torch.tensor([[9, 10], [30, 31]])
    rows = torch.arange(2)[:, None]
    got = problem.method.decode(q[rows, positions], k, v, positions=positions, **asked)
    assert_all_match([got], [whole(problem)[0][rows, positions]])
    for wrong in (positions - 10, positions + q.shape[1], positions[:, :1]):
        with pytest.raises(ValueError, match="positions"):
            problem.method.decode(q[rows, positions], k, v, positions=wrong, **asked)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_tensor_parallelism_does_not_change_the_function(variant: Variant, impl: str) -> None:
    problem = make(variant, variant.kinds[0], 3, heads=(8, 4))
    truth, all_params = whole(problem), problem.params or {}
    for first in (0, 2):
        heads = HeadSlice(first=2 * first, nheads=8, first_kv=first, nheads_kv=4)
        mine, mine_kv = slice(2 * first, 2 * first + 4), slice(first, first + 2)
        cuts = (mine, mine, mine_kv, mine_kv)
        expected = [x[:, :, cut] for x, cut in zip(truth[:4], cuts, strict=True)]
        for params in (all_params, {name: x[..., mine] for name, x in all_params.items()}):
            part = dataclasses.replace(
                problem,
                heads=heads,
                params=params or None,
                qkv=[x[:, :, cut] for x, cut in zip(problem.qkv, cuts[1:], strict=True)],
                dout=problem.dout[:, :, mine],
            )
            assert_all_match(whole(part)[:4], expected)
            got, sent = on_virtual_ranks(part, impl)
            assert_all_match(got[:4], expected)
        if impl == "torch" and getattr(problem.options, "top_k", None) is None:
            shape = Shape(2, 4, 2, 16, 8, heads=heads)
            assert sent == problem.method.bytes(problem.options, shape, problem.layout)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_heads_that_the_model_has_not_are_refused(variant: Variant) -> None:
    problem = make(variant, variant.kinds[0], 1, heads=(4, 4))
    for heads in (HeadSlice(2, 4, 2, 4), HeadSlice(0, 2, 0, 2), HeadSlice(0, 4, 1, 4)):
        with pytest.raises(ValueError, match="HeadSlice"):
            whole(dataclasses.replace(problem, heads=heads))
