"""Kept for backward, computed again, cut into tiles or sent to the host: one function always."""

from itertools import cycle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.distributed.mesh import build_mesh
from lcdist.model.build import build_model
from lcdist.model.memory.offload import CpuOffload
from lcdist.model.memory.recompute import SelectiveRecompute, recomputed
from lcdist.plan import make_plan
from tests.distributed import run_ranks
from tests.engines.internals import ddp_wrappers_of
from tests.live import LiveTensors
from tests.model.cases import Case, assert_same_gradients, results, tiers
from tests.model.small import (
    FULL,
    HOST,
    KEEP,
    Meshes,
    memory_options,
    mesh_name,
    small,
    take_steps,
)
from tests.tolerance import assert_matches

TP, PP, CP = (f"parallel.{axis}_size=2" for axis in ("tp", "pp", "cp"))
SP, VP = "parallel.sequence_parallel=true", "parallel.vp_size=2"
# No tile divides the 35.5 to 192 tokens that a rank has of a micro-batch.
TILED = ("train.mlp=tiled", "train.mlp_chunk=13")
WAYS: list[tuple[str, ...]] = memory_options(TILED)
TWO = [(TP,), (TP, SP), (CP,), (PP,), (PP, VP)]
FOUR = [(TP, CP, SP), (TP, PP, SP, VP), (PP, CP), (CP,)]


def cases() -> list[Case]:
    """Every way on every mesh of two ranks and on one; two ways on each of four."""
    turns, found = cycle(WAYS), []
    shapes = cycle(
        [
            ("train.seqlen=71", "data.documents=pack", "model.tied_embeddings=true"),
            ("train.seqlen=71",),
            ("train.seqlen=96", "model.tied_embeddings=true"),
        ]
    )
    for mesh in [(), *TWO]:
        shape, samples = next(shapes), 8 if VP in mesh else 4
        ranks = 2 if mesh else 1
        found += [Case(ranks, mesh, shape, way, samples=samples) for way in WAYS]
    for mesh in FOUR:
        shape = next(shapes)
        for _ in range(2):
            how = (*next(turns), "train.micro_batch_size=2")
            found.append(Case(4, mesh, shape, how, samples=8))
    return found


CASES = cases()
# By default every way on one rank, and in turn some ways on each mesh of two ranks.
ON_ONE, ON_TWO = ([case for case in CASES if case.world_size == size] for size in (1, 2))
TIERS = tiers([*ON_ONE, *ON_TWO[::7]], CASES)


@pytest.mark.parametrize(("tier", "case"), TIERS)
def test_gradients_equal_those_of_one_process_that_keeps_everything(
    tier: tuple[Case, ...], case: Case
) -> None:
    found, reference = results(tier, case.world_size)[case], results(tier, 1)[case.reference]
    assert_same_gradients(found, reference)
    if not case.mesh and case.how in ((FULL,), (HOST,), (KEEP,)):
        # Nothing is added up in another order.
        for name, expected in reference[0][3].items():
            assert torch.equal(found[0][3][name], expected)


def two_steps(rank: int, world_size: int, ways: list[tuple[str, ...]]) -> list[Any]:
    """Of each configuration: (loss, gradient norm) of two steps of two micro-batches, and how often
    each weight's hook ran in a backward that ends in a reduction."""
    found, meshes = [], Meshes()
    for words in ways:
        trainer = meshes.trainer(small(*words))
        numbers = take_steps(trainer, 2)
        groups = [group for wrapped in ddp_wrappers_of(trainer) for group in wrapped.bucket_groups]
        counts = {n for group in groups for n in group.golden_per_param_grad_ready_counts.values()}
        found.append((numbers, counts))
    return found


@pytest.mark.parametrize(
    "mesh",
    [(), *(pytest.param(mesh, marks=pytest.mark.exhaustive) for mesh in ((TP, SP), (CP,)))],
    ids=mesh_name,
)
def test_steps_and_gradient_hooks_are_those_of_keeping_everything(mesh: tuple[str, ...]) -> None:
    # The two meshes that are exhaustive share the ways.
    ways = WAYS[CP in mesh :: 2] if mesh else WAYS
    ranks = run_ranks(two_steps, 2, [mesh, *((*mesh, *way) for way in ways)])
    for (expected, whole_counts), *others in ranks:
        # Data-parallel ranks start to sum a gradient when every hook has run once.
        assert whole_counts == ({1} if TP not in mesh else set())
        for numbers, counts in others:
            assert counts == whole_counts
            for step, truth in zip(numbers, expected, strict=True):
                assert step == pytest.approx(truth, rel=1e-5)


# --- a layer --------------------------------------------------------------------------------------


def unasked(rank: int, world_size: int) -> list[list[Tensor]]:
    """Gradients of a layer's parameters whose input asks for none, each way."""
    found = []
    for way in ((), *WAYS):
        plan = make_plan(small(*way, "model.num_layers=1"), 1)
        [model] = build_model(plan, build_mesh(plan.config.parallel, 0).device)
        layer = model.double().decoder.layers[0]
        generator = torch.Generator().manual_seed(2)
        x, dout = (torch.randn(64, 1, 64, generator=generator).double() for _ in range(2))
        y, _ = layer(hidden_states=x, attention_mask=None)
        y.backward(dout)
        found.append([p.grad for p in layer.parameters()])
    return found


def test_a_layer_learns_though_its_input_asks_for_no_gradient() -> None:
    """As where embeddings are frozen: what Megatron's own recomputation loses in silence."""
    [[expected, *others]] = run_ranks(unasked, 1)
    for found in others:
        for actual, truth in zip(found, expected, strict=True):
            assert truth.count_nonzero()
            assert_matches(actual, truth)


def test_random_numbers_repeat_when_computed_again() -> None:
    weight, dout = torch.randn(7).double().requires_grad_(), torch.randn(5, 7).double()
    leaf = torch.randn(5, 7).double().requires_grad_()
    found = []
    for way in (lambda run: run(leaf), lambda run: recomputed(run, leaf, [weight])):
        torch.manual_seed(3)
        y = way(lambda x: F.dropout(x.sin() * weight, 0.5))
        torch.rand(2)
        found.append([y.detach(), *torch.autograd.grad(y, [leaf, weight], dout), torch.rand(1)])
    for actual, expected in zip(*found, strict=True):
        assert torch.equal(actual, expected) and expected.count_nonzero()


def test_registered_tensors_are_recomputed_in_any_view() -> None:
    x, weight = (torch.randn(n, 300).double().requires_grad_() for n in (200, 40))

    def chain(selective: SelectiveRecompute | None) -> Tensor:
        y = x.sin()
        if selective is not None:
            y = selective.register(recomputed(torch.sin, x), torch.sin, x)
        return y[3:, 7:].t() @ (y[3:, :] @ weight.t()).cos() * y.mean()

    expected = chain(None)
    truth = torch.autograd.grad(expected, [x, weight], torch.ones_like(expected))
    with LiveTensors() as live:
        selective = SelectiveRecompute()
        with selective:
            found = chain(selective)
        kept = live.now
    assert_matches(found.detach(), expected.detach())
    gradients = torch.autograd.grad(found, [x, weight], torch.ones_like(found))
    for actual, one in zip(gradients, truth, strict=True):
        assert_matches(actual, one)
    # The product before cos, its cos, the product after, the mean: not y, of 200 x 300.
    small_ones = 8 * (2 * 197 * 40 + 2 * 293 * 40 + 1)
    assert kept < small_ones + 2**14 < 8 * 200 * 300


# --- the host's memory ----------------------------------------------------------------------------


def test_what_went_to_the_host_comes_back_in_any_order() -> None:
    store, passes = CpuOffload(), []
    # Two micro-batches of three layers, as pipelining has them in flight; the second one's layers
    # come in another shape.
    for micro in range(2):
        sent = [torch.randn(5 + micro, 2, 3).transpose(0, 1) for _ in range(3)]
        passes.append([(x.clone(), store.put(4 + n, x)) for n, x in enumerate(sent)])
        for x in sent:
            x.zero_()
    for one in passes:
        for number, (expected, away) in reversed([*enumerate(one)]):
            assert torch.equal(away.get(), expected)
            # The one before it is on its way, and no other.
            under_way = [other.on_device is not None for _, other in one[:number]]
            assert under_way == [False] * (number - 1) + [True] * (number > 0)
    [first] = [away for _, away in passes[1][:1]]
    with pytest.raises(AttributeError):
        first.get()


def test_passes_are_not_chained() -> None:
    store = CpuOffload()
    first, again, second = (store.put(n, torch.ones(2)) for n in (1, 1, 2))
    assert first.previous is None and again.previous is None and second.previous is again
