"""A layer's second run takes attention from its first: it computes and sends nothing of it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lcdist.attention import Shape
from lcdist.exchange import Group, VirtualGroup, group_rank, traffic
from lcdist.model.memory.offload import CpuOffload
from lcdist.model.memory.recompute import recomputed
from lcdist_kernels import tape
from tests.attention.body import Problem, Variant, learned, make, variants

# What computes scores, in torch.
HEAVY = ("mm", "bmm", "baddbmm", "exp", "exp_", "exp2_", "logsumexp", "topk", "_scaled_dot_product")


class Heavy(TorchDispatchMode):
    """Counts operations that attention's forward is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(HEAVY[-1]) or name in HEAVY:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def checkpointed(
    problem: Problem, group: Group, impl: str, keep: bool, store: CpuOffload | None = None
) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Return [out, gradients] of attention that is recomputed, and what each run did.

    A run: (number of heavy operations, bytes sent).
    """
    layout, rank, params = problem.layout, group_rank(group), learned(problem) or {}
    parts = [layout.shard(x, rank, 1) for x in problem.qkv]
    x, runs = torch.cat(parts, 2).requires_grad_(), []

    def run(x: Tensor) -> Tensor:
        qkv = x.split([part.shape[2] for part in parts], 2)
        with Heavy() as heavy, traffic() as sent:
            out = problem.method.attention(
                *qkv,
                layout=layout,
                group=group,
                impl=impl,
                params=params or None,
                **problem.keywords(),
            )
        runs.append((len(heavy.found), sent.total))
        return out

    leaves = [x, *params.values()]
    put = None if store is None else lambda x: store.put(1, x)
    out = recomputed(run, x, leaves[1:], put, keep)
    grads = torch.autograd.grad(out, leaves, layout.shard(problem.dout, rank, 1))
    return [out.detach(), *grads], runs


@pytest.mark.parametrize(
    ("cp_size", "packed"),
    [(1, True), (2, False), pytest.param(4, True, marks=pytest.mark.exhaustive)],
)
@pytest.mark.parametrize("variant", variants(), ids=str)
def test_the_second_run_takes_attention_from_the_first(
    variant: Variant, cp_size: int, packed: bool
) -> None:
    problem = make(variant, variant.kinds[-1], cp_size, packed=packed, dtype=torch.float32)
    store = CpuOffload() if packed else None

    def both(group: Group) -> list[Any]:
        return [
            checkpointed(problem, group, "torch", keep, store if keep else None)
            for keep in (False, True)
        ]

    ranks = [both(None)] if cp_size == 1 else VirtualGroup(cp_size).run(both)
    for (expected, whole_runs), (found, runs) in ranks:
        for actual, truth in zip(found, expected, strict=True):
            assert torch.equal(actual, truth)
        [first, second] = whole_runs
        assert first == second and first[0]
        assert runs == [first, (0, 0)]
    assert cp_size == 1 or any(runs[0][1] for _, (_, runs) in ranks)


def kept_by_ranks(problem: Problem) -> list[int]:
    """Return the bytes that each rank keeps."""

    @torch.no_grad()
    def forward(group: Group) -> int:
        layout = problem.layout
        qkv = [layout.shard(x, group_rank(group), 1) for x in problem.qkv]
        with tape.record() as recorded:
            words = problem.keywords() | {"params": problem.params}
            problem.method.attention(*qkv, layout=layout, group=group, impl="torch", **words)
        # Parts of a received tensor share its memory.
        storages = {x.untyped_storage() for x in recorded.release()}
        return sum({x.data_ptr(): x.nbytes() for x in storages}.values())

    cp_size = problem.layout.cp_size
    return [forward(None)] if cp_size == 1 else VirtualGroup(cp_size).run(forward)


@pytest.mark.parametrize("cp_size", [1, 3])
@pytest.mark.parametrize("variant", variants(), ids=str)
def test_a_method_counts_what_it_keeps(variant: Variant, cp_size: int) -> None:
    problem = make(variant, variant.kinds[0], cp_size, dtype=torch.float32, heads=(8, 4))
    shape = Shape(2, 8, 4, 16, 4, problem.layout.seqlen)
    counted = variant.method.kept_bytes(variant.options, shape, problem.layout)
    most = max(kept_by_ranks(problem))
    if getattr(variant.options, "top_k", None) is None:
        # Ranks may be the fullest in different exchanges.
        assert most <= counted <= (1.1 if "longmixed" in str(variant) else 1) * most
    else:
        assert 0.3 * counted < most <= counted


def test_torchs_own_attention_on_a_cpu_is_not_computed_again() -> None:
    problem = make("full", "contiguous", 1, dtype=torch.float32)
    (expected, _), (found, runs) = (
        checkpointed(problem, None, "auto", keep) for keep in (False, True)
    )
    assert all(map(torch.equal, found, expected))
    assert runs == [(1, 0), (0, 0)]


def test_runs_must_make_the_same_calls() -> None:
    calls = [1]

    def run(x: Tensor) -> Tensor:
        for _ in range(calls[0]):
            [y] = tape.kept(lambda: [x.sin()])
        return y * x

    x = torch.ones(3, requires_grad=True)
    for second, message in ((2, "more calls"), (0, "fewer calls")):
        calls[0] = 1
        out = recomputed(lambda x: run(x) if calls[0] else x.clone(), x, keep=True)
        calls[0] = second
        with pytest.raises(RuntimeError, match=message):
            out.sum().backward()
    assert not tape.records() and not tape.replays()


def test_calls_inside_a_call_are_part_of_it() -> None:
    with tape.record() as recorded:
        outer = tape.kept(lambda: [*tape.kept(lambda: [torch.ones(2)]), "word"])
    tensors = recorded.release()
    assert len(tensors) == 1
    with tape.replay(recorded, tensors):
        found = tape.kept(list)
    assert torch.equal(found[0], outer[0]) and found[1] == "word"
