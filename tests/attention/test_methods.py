"""Tests that every attention method passes: one body, parametrized by METHODS.

The default tier covers every pair of layout and number of ranks; the full product is `exhaustive`.
"""

import dataclasses
from math import lcm

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
    output_on_virtual_ranks,
    tiered,
    variants,
    whole,
)
from tests.attention.checks import sent_and_planned
from tests.distributed import run_ranks
from tests.tolerance import relative_error

VARIANTS = variants()
LAYOUTS = [pytest.param(v, kind, id=f"{v}-{kind}") for v in VARIANTS for kind in v.kinds]
DECODING = [variant for variant in VARIANTS if "decode" in variant.method.supports]
NAMES = list(METHODS)
IMPLS = ("reference", "torch", "auto")

# (cp_size, impl, packed). On several ranks "auto" is another name for a built implementation.
EVERY_RUN = [
    (cp_size, impl, packed)
    for cp_size in (1, 2, 3, 4, 5, 6, 8)
    for impl in (IMPLS if cp_size == 1 else IMPLS[:2])
    for packed in (False, True)
]
# `test_processes_equal_reference` has two ranks, and four with documents.
DEFAULT_RUNS = {
    *((5, impl, True) for impl in ("reference", "torch")),
    (8, "torch", True),
    (4, "torch", False),
    (1, "auto", True),
}


@pytest.mark.parametrize(("cp_size", "impl", "packed"), tiered(EVERY_RUN, DEFAULT_RUNS))
@pytest.mark.parametrize(("variant", "kind"), LAYOUTS)
def test_virtual_ranks_equal_reference(
    variant: Variant, kind: str, cp_size: int, impl: str, packed: bool
) -> None:
    problem = make(variant, kind, cp_size, packed=packed)
    assert_all_match(on_virtual_ranks(problem, impl)[0], whole(problem))


@pytest.mark.parametrize(
    "nheads_kv", [8, 1, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (2, 4))]
)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_grouped_heads_equal_reference(variant: Variant, nheads_kv: int) -> None:
    problem = make(variant, variant.kinds[0], 3, heads=(8, nheads_kv))
    for impl in ("reference", "torch"):
        assert_all_match(on_virtual_ranks(problem, impl)[0], whole(problem))


def run_problems(
    rank: int, world_size: int, problems: list[tuple[Problem, str]]
) -> list[list[Tensor]]:
    """Return each problem's results on this process, for `run_ranks`."""
    group = torch.distributed.group.WORLD
    return [on_a_rank(problem, group, impl)[0] for problem, impl in problems]


@pytest.mark.parametrize("cp_size", [2, 4])
def test_processes_equal_reference(cp_size: int) -> None:
    problems = [
        (make(variant, kind, cp_size, packed="varlen" in variant.method.supports), impl)
        for variant in VARIANTS
        for kind in variant.kinds
        for impl in ("reference", "torch")
    ]
    ranks = run_ranks(run_problems, cp_size, problems)
    for (problem, _), *shards in zip(problems, *ranks, strict=True):
        assert_all_match(joined(problem, shards), whole(problem))


# Masks are the same in every implementation: equality with the reference covers the others.
ONE_AND_FOUR = [(cp_size, impl) for cp_size in (1, 4) for impl in IMPLS]
TORCH_ALONE = {(1, "torch"), (4, "torch")}


@pytest.mark.parametrize(("cp_size", "impl"), tiered(ONE_AND_FOUR, TORCH_ALONE))
@pytest.mark.parametrize(("variant", "kind"), LAYOUTS)
def test_output_does_not_depend_on_the_future(
    variant: Variant, kind: str, cp_size: int, impl: str
) -> None:
    problem = make(variant, kind, cp_size)
    before = output_on_virtual_ranks(problem, impl)
    for t in (1, 17, problem.layout.seqlen - 2):
        qkv = [torch.cat((x[:, :t], torch.randn_like(x[:, t:])), 1) for x in problem.qkv]
        out = output_on_virtual_ranks(dataclasses.replace(problem, qkv=qkv), impl)
        assert torch.equal(out[:, :t], before[:, :t])
        assert not torch.equal(out[:, t:], before[:, t:])


@pytest.mark.parametrize(("cp_size", "impl"), tiered(ONE_AND_FOUR, TORCH_ALONE))
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


@pytest.mark.parametrize(
    ("cp_size", "dtype"),
    tiered(
        [(n, dtype) for n in (1, 2, 5) for dtype in (torch.bfloat16, torch.float32, torch.float64)],
        {(1, torch.bfloat16), (2, torch.float64), (5, torch.bfloat16)},
    ),
)
@pytest.mark.parametrize(("variant", "kind"), LAYOUTS)
def test_bytes_are_those_on_the_wire(
    variant: Variant, kind: str, cp_size: int, dtype: torch.dtype
) -> None:
    problem = make(variant, kind, cp_size, dtype=dtype)
    sent, expected = sent_and_planned(problem, "torch")
    if getattr(problem.options, "top_k", None) is None:
        assert sent == expected
    else:  # What is chosen depends on the values: `bytes` is the most it can be.
        for counted, most in zip(sent, expected, strict=True):
            assert all(a <= b for a, b in zip(counted, most, strict=True))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_exchanges_are_those_on_the_wire(variant: Variant) -> None:
    problem = make(variant, variant.kinds[0], 3)

    def exchanges(rank: VirtualRank) -> set[str]:
        with traffic() as counted:
            on_a_rank(problem, rank, "torch")
        return {verb for verb, sent in counted.sent.items() if sent}

    used = set().union(*VirtualGroup(3).run(exchanges))
    assert used == set(variant.method.exchange_for(variant.options)) <= set(variant.method.exchange)


# The first variant of each method: options of a method merge blocks alike.
GROWTH = [
    pytest.param(variant, marks=() if str(variant) == "full" else pytest.mark.exhaustive)
    for variant in {variant.name: variant for variant in reversed(VARIANTS)}.values()
]


@pytest.mark.parametrize("variant", GROWTH, ids=str)
def test_error_in_bf16_does_not_grow_with_the_number_of_ranks(variant: Variant) -> None:
    kind, many = variant.kinds[0], 32
    problem = make(variant, kind, many, at_least=512, dtype=torch.bfloat16)
    # Without rotation: its error in bf16 is the same for any number of ranks.
    problem = dataclasses.replace(problem, inv_freq=None)
    wide = dataclasses.replace(
        problem, qkv=[x.double() for x in problem.qkv], dout=problem.dout.double()
    )
    truth = whole(wide)

    def errors(cp_size: int) -> list[float]:
        layout = dataclasses.replace(problem.layout, cp_size=cp_size)
        actual = on_virtual_ranks(dataclasses.replace(problem, layout=layout), "torch")[0]
        return [relative_error(a, r) for a, r in zip(actual, truth, strict=True)]

    for few, most in zip(errors(2), errors(many), strict=True):
        assert most < 1.2 * few


@pytest.mark.parametrize("name", NAMES)
def test_facts_follow_the_contract(name: str) -> None:
    method = METHODS[name]
    options = method.options()
    assert method.name == name and method.options.__dataclass_params__.frozen
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.name = "other"  # pyright: ignore[reportAttributeAccessIssue]
    assert set(method.layouts_for(options)) <= set(method.layouts) <= set(KINDS)
    assert set(method.exchange) <= {"ring", "shift", "gather", "swap"} and method.exchange
    assert method.supports <= {
        *("gqa", "varlen", "decode", "dense", "landmarks", "rotated"),
    }
    for kind in method.layouts_for(options):
        for cp_size in (1, 2, 3):
            step = method.multiple_of(options, cp_size, kind)
            fits = lcm(step, pieces_needed(kind, cp_size))
            assert ContextLayout(kind, fits, cp_size, step).multiple_of == step
    sizes = {key: tuple(value.shape) for key, value in method.initial(options, 8).items()}
    assert sizes == dict(method.parameters(options, 8))
    assert all(size[-1] == 8 for size in sizes.values())


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_wrong_calls_raise_before_anything_is_sent(variant: Variant) -> None:
    problem = make(variant, variant.kinds[0], 2)
    method, layout = problem.method, problem.layout
    shards = [layout.shard(x, 0, 1) for x in problem.qkv]
    group = VirtualGroup(2)[0]
    keywords = {"options": problem.options, "layout": layout, "group": group}
    for change, message in [
        ({"impl": "cuda"}, "impl = 'cuda'"),
        ({"group": None}, "cp_size = 2, the group has 1"),
        ({"group": VirtualGroup(3)[0]}, "cp_size = 2, the group has 3"),
        ({"layout": dataclasses.replace(layout, seqlen=2 * layout.seqlen)}, "every rank"),
        ({"params": {"no_such_name": torch.zeros(1)}}, "no_such_name"),
    ]:
        with pytest.raises(ValueError, match=message):
            method.attention(*shards, **(keywords | change))


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
            actual, sent = on_virtual_ranks(part, impl)
            assert_all_match(actual[:4], expected)
        if impl == "torch" and getattr(problem.options, "top_k", None) is None:
            shape = Shape(2, 4, 2, 16, 8, heads=heads)
            assert sent == problem.method.bytes(problem.options, shape, problem.layout)


# `reference` and `attention` share this default, so comparing them would not show an error in it.
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_softmax_scale_is_used_and_has_a_default(variant: Variant) -> None:
    problem = make(variant, variant.kinds[0], 1)

    def output(softmax_scale: float | None) -> Tensor:
        scaled = dataclasses.replace(problem, softmax_scale=softmax_scale)
        return output_on_virtual_ranks(scaled, "torch")

    default = variant.method.default_scale(16)
    assert_all_match([output(None)], [output(default)])
    assert relative_error(output(0.5 * default), output(default)) > 1e-3


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_heads_outside_the_model_raise(variant: Variant) -> None:
    problem = make(variant, variant.kinds[0], 1, heads=(4, 4))
    for heads in (HeadSlice(2, 4, 2, 4), HeadSlice(0, 2, 0, 2), HeadSlice(0, 4, 1, 4)):
        with pytest.raises(ValueError, match="HeadSlice"):
            whole(dataclasses.replace(problem, heads=heads))
