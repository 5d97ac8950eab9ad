"""What every attention method keeps, whatever it computes: one body, parametrized by METHODS."""

import dataclasses
from math import lcm

import pytest
import torch
from torch import Tensor

from lcdist.attention import METHODS, HeadSlice, Shape
from lcdist.exchange import VirtualGroup
from lcdist.layout import KINDS, ContextLayout, pieces_needed
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
from tests.tolerance import relative_error

LAYOUTS = [(name, kind) for name, m in METHODS.items() for kind in m.layouts_for(m.options())]
NAMES = list(METHODS)
IMPLS = ["reference", "torch", "auto"]
# On more ranks than one "auto" is another name for a built implementation.
RUNS = [(cp, impl) for cp in (1, 2, 3, 4, 5, 6, 8) for impl in IMPLS if cp == 1 or impl != "auto"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("cp_size", "impl"), RUNS)
@pytest.mark.parametrize(("name", "kind"), LAYOUTS)
def test_on_virtual_ranks_equals_reference(
    name: str, kind: str, cp_size: int, packed: bool, impl: str
) -> None:
    problem = make(name, kind, cp_size, packed=packed)
    assert_all_match(on_virtual_ranks(problem, impl)[0], whole(problem))


@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_grouped_heads(name: str, heads: tuple[int, int]) -> None:
    problem = make(name, METHODS[name].layouts[0], 3, heads=heads)
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
        (make(name, kind, cp_size, packed="varlen" in METHODS[name].supports), impl)
        for name, kind in LAYOUTS
        for impl in ("reference", "torch")
    ]
    ranks = run_ranks(every_problem, cp_size, problems)
    for (problem, _), *shards in zip(problems, *ranks, strict=True):
        assert_all_match(joined(problem, shards), whole(problem))


@pytest.mark.parametrize(("cp_size", "impl"), [run for run in RUNS if run[0] in (1, 4)])
@pytest.mark.parametrize(("name", "kind"), LAYOUTS)
def test_no_output_knows_the_future(name: str, kind: str, cp_size: int, impl: str) -> None:
    problem = make(name, kind, cp_size)
    before = on_virtual_ranks(problem, impl)[0][0]
    for t in (1, 17, problem.layout.seqlen - 1):
        for i, x in enumerate(problem.qkv):
            changed = x.clone()
            changed[:, t:] = torch.randn_like(changed[:, t:])
            qkv = [*problem.qkv[:i], changed, *problem.qkv[i + 1 :]]
            out = on_virtual_ranks(dataclasses.replace(problem, qkv=qkv), impl)[0][0]
            assert torch.equal(out[:, :t], before[:, :t])
            assert not torch.equal(out[:, t:], before[:, t:])


@pytest.mark.parametrize(("cp_size", "impl"), [run for run in RUNS if run[0] in (1, 4)])
@pytest.mark.parametrize(("name", "kind"), LAYOUTS)
def test_nothing_leaks_between_documents(name: str, kind: str, cp_size: int, impl: str) -> None:
    problem = make(name, kind, cp_size, packed=True)
    assert problem.cu_seqlens is not None
    start, stop = problem.cu_seqlens[-3:-1].tolist()
    assert start < stop
    inside = torch.zeros(problem.layout.seqlen, dtype=torch.bool)
    inside[start:stop] = True
    before = on_virtual_ranks(problem, impl)[0]
    changed = [x.where(~inside[:, None, None], torch.randn_like(x)) for x in problem.qkv]
    dout = problem.dout.where(~inside[:, None, None], torch.randn_like(problem.dout))
    after = on_virtual_ranks(dataclasses.replace(problem, qkv=changed, dout=dout), impl)[0]
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a[:, ~inside], b[:, ~inside])
        assert not torch.equal(a[:, inside], b[:, inside])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("cp_size", [1, 2, 5])
@pytest.mark.parametrize(("name", "kind"), LAYOUTS)
def test_bytes_are_those_on_the_wire(
    name: str, kind: str, cp_size: int, dtype: torch.dtype
) -> None:
    problem = make(name, kind, cp_size, dtype=dtype)
    shape = Shape(batch=2, nheads=4, nheads_kv=2, head_dim=16, itemsize=dtype.itemsize)
    expected = problem.method.bytes(problem.options, shape, problem.layout)
    assert on_virtual_ranks(problem, "torch")[1] == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_error_in_bf16_does_not_grow_with_the_number_of_ranks(name: str) -> None:
    kind = METHODS[name].layouts[0]
    fine = make(name, kind, 64, at_least=512, dtype=torch.bfloat16)
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
    assert method.supports <= {"gqa", "varlen", "decode"}
    for kind in method.layouts_for(options):
        for cp_size in (1, 2, 3):
            step = method.multiple_of(options, cp_size, kind)
            fits = lcm(step, pieces_needed(kind, cp_size))
            assert ContextLayout(kind, fits, cp_size, step).multiple_of == step
    assert all(len(size) >= 1 for size in method.parameters(options, 8).values())


@pytest.mark.parametrize("name", NAMES)
def test_wrong_calls_are_refused_before_anything_is_sent(name: str) -> None:
    problem = make(name, METHODS[name].layouts[0], 2)
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


@pytest.mark.parametrize("name", [n for n in NAMES if "decode" in METHODS[n].supports])
@pytest.mark.parametrize("step", [1, 7])
def test_decode_token_by_token_equals_reference(name: str, step: int) -> None:
    problem = make(name, METHODS[name].layouts[0], 1)
    q, k, v = problem.qkv
    out = whole(problem)[0]
    asked = {key: value for key, value in problem.asked().items() if key != "cu_seqlens"}
    room = torch.full_like(k, torch.nan)
    k_cache, v_cache = torch.cat([k, room], 1), torch.cat([v, room], 1)
    got = []
    for positions in torch.arange(q.shape[1]).split(step):
        got.append(
            problem.method.decode(q[:, positions], k_cache, v_cache, positions=positions, **asked)
        )
    assert_all_match([torch.cat(got, 1)], [out])


@pytest.mark.parametrize("name", [n for n in NAMES if "decode" in METHODS[n].supports])
def test_decode_rows_of_different_lengths(name: str) -> None:
    problem = make(name, METHODS[name].layouts[0], 1)
    q, k, v = problem.qkv
    asked = {key: value for key, value in problem.asked().items() if key != "cu_seqlens"}
    positions = torch.tensor([[9, 10], [30, 31]])
    rows = torch.arange(2)[:, None]
    got = problem.method.decode(q[rows, positions], k, v, positions=positions, **asked)
    assert_all_match([got], [whole(problem)[0][rows, positions]])
    for wrong in (positions - 10, positions + q.shape[1], positions[:, :1]):
        with pytest.raises(ValueError, match="positions"):
            problem.method.decode(q[rows, positions], k, v, positions=wrong, **asked)


@pytest.mark.parametrize("name", NAMES)
def test_a_slice_of_the_heads_is_that_slice_of_the_result(name: str) -> None:
    problem = make(name, METHODS[name].layouts[0], 1)
    q, k, v = problem.qkv
    heads = HeadSlice(first=2, nheads=2, first_kv=1, nheads_kv=1)
    part = problem.method.reference(
        q[:, :, 2:], k[:, :, 1:], v[:, :, 1:], heads=heads, **problem.asked()
    )
    assert_all_match([part], [whole(problem)[0][:, :, 2:]])
