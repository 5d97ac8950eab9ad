"""The tiled MLP is Megatron's whole one: outputs, and gradients of all that asks for one."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.distributed.mesh import build_mesh
from lcdist.model.build import build_model
from lcdist.model.memory.recompute import recomputed
from lcdist.model.memory.tiled_mlp import MLPBlock, sequence_tiled
from lcdist.plan import make_plan
from tests.distributed import run_ranks
from tests.live import LiveTensors
from tests.model.small import small
from tests.tolerance import assert_as_good_as_eager, assert_matches

TP, SP = "parallel.tp_size=2", "parallel.sequence_parallel=true"
MLP_LORA = ("lora.rank=3", 'lora.targets=["gate","up","down"]')
UP_LORA = ("lora.rank=3", 'lora.targets=["gate"]')


@dataclass(frozen=True)
class Problem:
    """x `[s, b, h]` through a layer with random weights; chunk: tokens of a tile.

    frozen: parameters whose name has it ask for no gradient. leaf: whether x asks for one.
    """

    words: tuple[str, ...]
    seqlen: int
    batch: int
    chunk: int
    frozen: str | None = None
    leaf: bool = True


def draw(shape: torch.Size | tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def layer_of(words: tuple[str, ...]) -> Any:
    """Build the first layer of the small model in fp64; sharded weights differ between ranks."""
    config = small(*words, "model.num_layers=1")
    mesh = build_mesh(config.parallel, 0)
    plan = make_plan(config, 2 if TP in words else 1)
    [model] = build_model(plan, mesh.device)
    layer = model.double().decoder.layers[0]
    for number, p in enumerate(layer.parameters()):
        cut = getattr(p, "tensor_model_parallel", False)
        seed = number + (1000 * mesh.tp_rank if cut else 0)
        p.data = draw(p.shape, seed) / (p.shape[-1] ** 0.5) + (p.dim() == 1)
    return layer


def both(layer: Any, problem: Problem, rank: int) -> tuple[list[Any], list[Any]]:
    """[y, dx, gradients of parameters] tiled and by Megatron's modules alone."""
    half = MLPBlock(layer.pre_mlp_layernorm, layer.mlp)
    shape = (problem.seqlen // half.parts, problem.batch, layer.config.hidden_size)
    x = draw(shape, 7 + (rank if half.parts > 1 else 0))
    dout = draw(shape, 70 + (rank if half.parts > 1 else 0))
    for name, p in layer.named_parameters():
        p.requires_grad_(problem.frozen is None or problem.frozen not in name)

    def whole(x: Tensor) -> Tensor:
        return x + layer.mlp(layer.pre_mlp_layernorm(x))[0]

    found = []
    for way in (lambda x: sequence_tiled(half, x, problem.chunk), whole):
        x = x.detach().requires_grad_(problem.leaf)
        layer.zero_grad()
        y = way(x)
        y.backward(dout)
        parameters = [*layer.pre_mlp_layernorm.parameters(), *layer.mlp.parameters()]
        found.append([y.detach(), x.grad, *[p.grad for p in parameters]])
    return found[0], found[1]


def on_ranks(
    rank: int, world_size: int, problems: list[Problem]
) -> list[tuple[list[Any], list[Any]]]:
    layers: dict[tuple[str, ...], Any] = {}
    found = []
    for problem in sorted(problems, key=lambda p: p.words):
        if problem.words not in layers:
            layers[problem.words] = layer_of(problem.words)
        found.append(both(layers[problem.words], problem, rank))
    return found


# One token, sizes that do not divide, all at once, more than there are.
CHUNKS = [1, 5, 14, 42, 1000]
FROZEN = [
    Problem((), 14, 3, 13, frozen="linear_fc1"),
    Problem((), 14, 3, 13, frozen="linear_fc2"),
    Problem((), 14, 3, 13, frozen="norm"),
    Problem((), 14, 3, 13, frozen="weight", leaf=True),
    Problem((), 14, 3, 13, leaf=False),
    Problem((), 14, 3, 13, frozen="linear_fc1", leaf=False),
    Problem(MLP_LORA, 14, 3, 13, frozen="weight", leaf=False),
]


def problems(world_size: int) -> list[Problem]:
    ways: list[tuple[str, ...]] = [(), MLP_LORA, UP_LORA]
    if world_size == 2:
        ways = [(*mesh, *way) for way in ways for mesh in ((TP,), (TP, SP))]
    found = [Problem(w, 14, batch, n) for w in ways for batch in (1, 3) for n in CHUNKS]
    return found if world_size == 2 else [*found, *FROZEN]


@pytest.mark.parametrize("world_size", [1, 2])
def test_tiles_equal_megatrons_mlp(world_size: int) -> None:
    asked = sorted(problems(world_size), key=lambda p: p.words)
    for answers in run_ranks(on_ranks, world_size, asked):
        for problem, (mine, theirs) in zip(asked, answers, strict=True):
            assert any(g is not None for g in theirs[1:]) and len(mine) == len(theirs)
            for actual, expected in zip(mine, theirs, strict=True):
                assert (actual is None) == (expected is None), problem
                if expected is not None:
                    assert expected.count_nonzero(), problem
                    assert_matches(actual, expected)


def low_precision(rank: int, world_size: int) -> None:
    layer = layer_of(()).bfloat16()
    half = MLPBlock(layer.pre_mlp_layernorm, layer.mlp)
    x, dout = (draw((100, 1, 64), seed).bfloat16() for seed in (7, 70))

    def gradients(way: Any, dtype: torch.dtype) -> list[Tensor]:
        leaf = x.to(dtype).requires_grad_()
        leaves = [leaf, *half.norm.parameters(), *half.mlp.parameters()]
        y = way(leaf)
        return [y.detach(), *torch.autograd.grad(y, leaves, dout.to(dtype))]

    def whole(x: Tensor) -> Tensor:
        return x + half.mlp(half.norm(x))[0]

    # As many tiles as tokens: summed in bf16 they would lose what they sum to.
    mine = gradients(lambda x: sequence_tiled(half, x, 1), torch.bfloat16)
    theirs = gradients(whole, torch.bfloat16)
    layer.double()
    truth = gradients(whole, torch.float64)
    for actual, other, true in zip(mine, theirs, truth, strict=True):
        assert actual.dtype == torch.bfloat16
        assert_as_good_as_eager(actual, other, true)


def test_bf16_is_as_good_as_whole() -> None:
    run_ranks(low_precision, 1)


class Dropped(nn.Module):
    """A linear of Megatron's kind that drops some of what it returns."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.dropout(self.inner(x)[0], 0.4), None


def random_numbers(rank: int, world_size: int) -> list[list[Tensor]]:
    layer = layer_of(())
    layer.mlp.linear_fc1 = Dropped(layer.mlp.linear_fc1)
    half = MLPBlock(layer.pre_mlp_layernorm, layer.mlp)
    parameters = list(layer.mlp.parameters())
    x, dout = draw((14, 3, 64), 7), draw((14, 3, 64), 70)

    def by_hand(x: Tensor) -> Tensor:
        return torch.cat([half(tile) for tile in x.split(5)])

    def twice(x: Tensor) -> Tensor:
        return recomputed(lambda x: sequence_tiled(half, x, 15), x, parameters)

    found = []
    for way in (by_hand, lambda x: sequence_tiled(half, x, 15), twice):
        torch.manual_seed(5)
        x = x.detach().requires_grad_()
        y = way(x)
        torch.rand(3)
        after = torch.random.get_rng_state()
        found.append([y.detach(), *torch.autograd.grad(y, [x, *parameters], dout)])
        assert torch.equal(torch.random.get_rng_state(), after)
    return found


def test_random_numbers_repeat_in_backward() -> None:
    [(expected, *others)] = run_ranks(random_numbers, 1)
    for found in others:
        for actual, truth in zip(found, expected, strict=True):
            assert_matches(actual, truth)


def unread(rank: int, world_size: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    layer = layer_of(())
    half = MLPBlock(layer.pre_mlp_layernorm, layer.mlp)
    x, dout = draw((14, 3, 64), 7).requires_grad_(), draw((14, 3, 64), 70)
    leaves = [x, *half.mlp.parameters()]
    blind = sequence_tiled(half, x, 15, skip_output=True)
    found = torch.autograd.grad(blind, leaves, dout)
    return (
        blind.detach(),
        [*found],
        [*torch.autograd.grad(sequence_tiled(half, x, 15), leaves, dout)],
    )


def test_what_nobody_reads_is_not_computed() -> None:
    [(blind, found, expected)] = run_ranks(unread, 1)
    assert blind.isnan().all()
    for actual, truth in zip(found, expected, strict=True):
        assert torch.equal(actual, truth)


# --- memory ---------------------------------------------------------------------------------------

TOKENS, FFN, CHUNK = 8192, 384, 256
WIDE = (
    "model.num_layers=1",
    f"model.ffn_hidden_size={FFN}",
    f"train.seqlen={TOKENS}",
    "train.mlp=tiled",
    f"train.mlp_chunk={CHUNK}",
)


def peaks(rank: int, world_size: int) -> tuple[int, int, int, int]:
    """Bytes: kept and peak of the tiled half, and of Megatron's."""
    config = small(*WIDE)
    [model] = build_model(make_plan(config, 1), build_mesh(config.parallel, 0).device)
    layer: Any = model.decoder.layers[0]
    half = MLPBlock(layer.pre_mlp_layernorm, layer.mlp)
    found = []
    for way in (lambda x: sequence_tiled(half, x, CHUNK), lambda x: x + layer.mlp(half.norm(x))[0]):
        x = torch.randn(TOKENS, 1, 64, requires_grad=True)
        dout = torch.randn_like(x)
        layer.zero_grad()
        with LiveTensors() as live:
            y = way(x)
            kept = live.now - y.nbytes
            y.backward(dout)
        found += [kept, live.peak]
    return found[0], found[1], found[2], found[3]


def test_the_peak_is_that_of_a_tile() -> None:
    [(kept, peak, whole_kept, whole_peak)] = run_ranks(peaks, 1)
    hidden, ffn = 4 * TOKENS * 64, 4 * TOKENS * FFN
    # Nothing but the states of random generators is kept beside x, which lived before.
    assert kept < 2**14
    # Gate, up, silu, a copy of up, the product; the norm's output and a number for each token.
    assert whole_kept == pytest.approx(5 * ffn + hidden + 4 * TOKENS, rel=0.01)
    assert whole_peak > whole_kept
    plan = make_plan(small(*WIDE), 1)
    assert plan.memory.mlp_chunk(TOKENS) == CHUNK
    # y and dx, and what a tile has.
    assert peak < 2 * hidden + plan.memory.tile_bytes
    assert peak == pytest.approx(2 * hidden + plan.memory.tile_bytes, rel=0.02)
