"""The sharded AdamW is torch's AdamW: the same bits over any owners, and as in a plain loop."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lcdist.config.schema import Config, OptimConfig
from lcdist.distributed.mesh import build_mesh
from lcdist.engines import optimizer as room
from lcdist.engines.forward import MegatronForward
from lcdist.engines.moments import assign_owners
from lcdist.engines.optimizer import ShardedAdamW
from lcdist.model.build import build_model
from lcdist.model.init import whole_model_names
from lcdist.model.sequence import SequenceParams
from lcdist.train.trainer import Trainer
from tests.distributed import run_ranks
from tests.engines.internals import chunks_of, log_entry_of, optimizer_of
from tests.model.small import Meshes, small, take_steps
from tests.model.whole import digest, gather_moments, gather_weights
from tests.tolerance import assert_matches

OPTIM = OptimConfig(lr=1e-2, weight_decay=0.5, clip_norm=0.5)
STEPS = 4


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 9))
def test_owners_share_the_load(sizes: list[int], count: int) -> None:
    owners = assign_owners(sizes, count)
    assert len(owners) == len(sizes) and set(owners) <= set(range(count))
    held = [[s for s, o in zip(sizes, owners, strict=True) if o == rank] for rank in range(count)]
    least = min(map(sum, held))
    for mine in held:
        # Without its last tensor, an owner held no more than anyone does at the end.
        assert not mine or sum(mine) - min(mine) <= least


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 9))
def test_owners_are_a_function_of_the_sizes(sizes: list[int], count: int) -> None:
    assert assign_owners(sizes, count) == assign_owners(tuple(sizes), count)


class Bits(nn.Module):
    """Parameters of odd shapes, matrices and vectors, with gradients as DDP would leave them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        for i, shape in enumerate([(7, 5), (11,), (3, 3), (1,), (2, 3, 4), (13, 1)]):
            value = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(f"p{i}", nn.Parameter(value))

    def make_gradients(self, step: int) -> None:
        """Gradients that depend on the step alone."""
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in self.parameters():
            vars(parameter)["main_grad"] = torch.randn(parameter.shape, generator=generator)


def plain_steps(dtype: torch.dtype) -> tuple[list[float], dict[str, Tensor]]:
    """Step the same parameters and gradients with torch alone, in fp32 throughout."""
    bits = Bits(dtype).float()
    named = dict(bits.named_parameters())
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in named.values() if p.ndim > 1]},
            {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=OPTIM.lr,
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
        weight_decay=OPTIM.weight_decay,
        fused=True,
    )
    norms = []
    for step in range(STEPS):
        bits.make_gradients(step)
        squares = sum(p.main_grad.double().square().sum() for p in named.values())
        norms.append(float(squares) ** 0.5)
        for p in named.values():
            p.grad = p.main_grad * min(1.0, OPTIM.clip_norm / norms[-1])
        adamw.step()
    return norms, {name: p.detach().to(dtype) for name, p in named.items()}


def sharded_steps(rank: int, world_size: int) -> list[tuple[list[float], dict[str, Tensor], int]]:
    """(norms, parameters, bytes of moments held) over dp, then over cp; fp32, then bf16."""
    found = []
    cp = [1, world_size] if world_size > 1 else [1]
    for dtype in (torch.float32, torch.bfloat16):
        for cp_size in cp:
            config = small(f"parallel.cp_size={cp_size}")
            mesh = build_mesh(config.parallel, 0)
            bits = Bits(dtype)
            optimizer = ShardedAdamW([bits], OPTIM, mesh.dp_cp_group)
            norms = []
            for step in range(STEPS):
                bits.make_gradients(step)
                # One token over all ranks: the summed gradient is the mean.
                log_entry = torch.tensor([0.0, rank == 0], dtype=torch.float64)
                norms.append(optimizer.accept(optimizer.step(OPTIM.lr, log_entry).tolist()))
            assert all(m.dtype == torch.float32 for m in optimizer.masters)
            mine = sum(m.numel() for m in optimizer.masters)
            values = {n: p.detach().clone() for n, p in bits.named_parameters()}
            found.append((norms, values, mine))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_sharded_is_unsharded_bit_for_bit(world_size: int) -> None:
    answers = run_ranks(sharded_steps, world_size)
    total = sum(p.numel() for p in Bits(torch.float32).parameters())
    for case, of_ranks in enumerate(zip(*answers, strict=True)):
        dtype = torch.float32 if case < len(answers[0]) // 2 else torch.bfloat16
        norms, expected = plain_steps(dtype)
        assert sum(mine for _, _, mine in of_ranks) == total, "moments are held once"
        for found_norms, found, _ in of_ranks:
            assert found_norms == pytest.approx(norms, rel=1e-14)
            for name, value in expected.items():
                assert found[name].dtype == dtype
                assert torch.equal(found[name], value), name


def broadcast_in_pieces(rank: int, world_size: int) -> bool:
    room.BROADCAST_ELEMENTS = 20
    [(_, small_pieces, _), *_] = sharded_steps(rank, world_size)
    return all(torch.equal(v, small_pieces[n]) for n, v in plain_steps(torch.float32)[1].items())


def test_values_travel_in_pieces() -> None:
    assert run_ranks(broadcast_in_pieces, 2) == [True, True]


def refused(rank: int, world_size: int, mesh: tuple[str, ...]) -> list[tuple[str, bool]]:
    """Return (message, whether nothing changed) of steps that are refused, each for one reason.

    A gradient is infinite, or the loss is not a number, on the last rank alone; or no token counts.
    """
    trainer = Meshes().trainer(small(*mesh))
    take_steps(trainer, 1)
    engine, found = trainer.engine, []
    [chunk] = chunks_of(trainer)
    is_last = rank == world_size - 1
    named = whole_model_names(chunk)
    for reason in ("gradient", "loss", "tokens"):
        hooks, batches = [], trainer.loader.next_step()
        if reason == "gradient" and is_last:
            [weights] = [p for name, p in chunk.named_parameters() if named[name] == POISONED]
            # When its gradient arrives and before it is summed over ranks.
            hooks.append(weights.register_hook(lambda _, w=weights: fill_with_infinity(w)))
        if reason == "tokens":
            for batch in batches:
                batch.loss_mask.zero_()
        engine.forward_backward(batches)
        if reason == "loss" and is_last:
            log_entry_of(trainer)[0] = float("nan")
        for hook in hooks:
            hook.remove()
        before = everything(trainer)
        with pytest.raises(FloatingPointError) as caught:
            engine.step(1e-3)
        found.append((str(caught.value), everything(trainer) == before))
    return found


def fill_with_infinity(weights: nn.Parameter) -> None:
    vars(weights)["main_grad"].fill_(float("inf"))


# In the last layer, which the second pipeline stage counts as its own number 1.
POISONED = "decoder.layers.3.self_attention.linear_qkv.weight"


def everything(trainer: Trainer) -> str:
    engine, optimizer = trainer.engine, optimizer_of(trainer)
    own = digest({str(i): p.detach() for i, p in enumerate(optimizer.masters)})
    whole = gather_weights(engine) | gather_moments(engine)
    return f"{digest(whole)} {own} {optimizer.steps}"


@pytest.mark.parametrize(
    "mesh", [("parallel.pp_size=2",), ("parallel.tp_size=2",), ()], ids=["pp2", "tp2", "dp2"]
)
def test_a_refused_step_stops_every_rank_and_changes_nothing(mesh: tuple[str, ...]) -> None:
    for found in run_ranks(refused, 2, mesh):
        assert all(untouched for _, untouched in found)
        gradient, loss, tokens = (message for message, _ in found)
        assert gradient.endswith(f"non-finite gradients: {POISONED}")
        assert loss == "loss is nan, and no gradient shows it"
        assert tokens == "no token of this step has a loss"


Steps = tuple[list[tuple[float, float]], dict[str, Tensor]]


def engine_steps(rank: int, world_size: int, mesh: tuple[str, ...]) -> Steps:
    """(loss, gradient norm) of each step, and the weights after them."""
    trainer = Meshes().trainer(plain_config(*mesh))
    numbers = take_steps(trainer, STEPS, lr=plain_config().optim.lr)
    return numbers, gather_weights(trainer.engine)


def plain_config(*mesh: str) -> Config:
    """Clipping that bites, decay that shows, micro-batches that add up, masked tokens and padding.

    eps: at 1e-8 Adam makes a step of full size out of the rounding error of a gradient that is 0.
    """
    optim = ["optim.eps=1e-5", "optim.weight_decay=0.5", "optim.clip_norm=0.3"]
    return small(*optim, "data.documents=pack", "train.seqlen=71", *mesh)


def plain_loop(rank: int, world_size: int) -> Steps:
    """Train the same model with torch's autograd, clipping and AdamW, the whole batch summed."""
    config = plain_config()
    trainer = Meshes().trainer(config)
    [model] = build_model(trainer.plan, trainer.mesh.device)
    decaying, others = [], []
    for name, parameter in model.named_parameters():
        (others if "norm" in name else decaying).append(parameter)
    optim = config.optim
    adamw = torch.optim.AdamW(
        [{"params": decaying}, {"params": others, "weight_decay": 0.0}],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
    numbers = []
    for _ in range(STEPS):
        total, tokens = torch.zeros(()), 0
        for batch in trainer.loader.next_step():
            how = SequenceParams(layout=trainer.plan.layout, cu_seqlens=batch.cu_seqlens)
            assert not batch.loss_mask.all()
            losses = model(batch.tokens, None, None, labels=batch.labels, packed_seq_params=how)
            total = total + (losses * batch.loss_mask).sum()
            tokens += int(batch.loss_mask.sum())
        adamw.zero_grad()
        (total / tokens).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        assert norm > optim.clip_norm, "nothing was clipped"
        adamw.step()
        numbers.append((float(total / tokens), float(norm)))
    return numbers, gather_weights(MegatronForward(trainer.mesh, [model]))


@pytest.mark.parametrize(
    ("world_size", "mesh"),
    [(1, ()), (2, ()), (4, ("parallel.tp_size=2", "parallel.sequence_parallel=true"))],
    ids=["one", "dp2", "tp2-sp-dp2"],
)
def test_the_engine_is_a_plain_loop(world_size: int, mesh: tuple[str, ...]) -> None:
    [(numbers, weights), *_] = run_ranks(engine_steps, world_size, mesh)
    [(plain_numbers, plain_weights)] = run_ranks(plain_loop, 1)
    for found, expected in zip(numbers, plain_numbers, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
    for name, expected in plain_weights.items():
        assert_matches(weights[name], expected, 1e-6)


def bf16_steps(rank: int, world_size: int, mesh: tuple[str, ...]) -> list[tuple[float, float]]:
    trainer = Meshes().trainer(small("train.dtype=bf16", *mesh))
    assert {p.dtype for chunk in chunks_of(trainer) for p in chunk.parameters()} == {torch.bfloat16}
    numbers = take_steps(trainer, STEPS)
    pairs = zip(optimizer_of(trainer).mine, optimizer_of(trainer).masters, strict=True)
    for parameter, master in pairs:
        assert master.dtype == torch.float32
        assert torch.equal(parameter, master.bfloat16())
    # The update of a step is below bf16's resolution for most weights: masters must hold more.
    lost: Callable[[Tensor], bool] = lambda m: not torch.equal(m, m.bfloat16().float())  # noqa: E731
    assert all(lost(m.detach()) for m in optimizer_of(trainer).masters if m.ndim > 1)
    dist.barrier()
    return numbers


def test_bf16_weights_have_fp32_masters() -> None:
    [single] = run_ranks(bf16_steps, 1, ())
    for numbers in run_ranks(bf16_steps, 2, ("parallel.cp_size=2",)):
        # bf16 keeps 8 bits: activations are rounded alike but added in another order.
        for (loss, _), (expected, _) in zip(numbers, single, strict=True):
            assert loss == pytest.approx(expected, rel=2**-8)
