"""The engine protocols: what forward_backward calls, and what a forward engine returns."""

from typing import Any

import pytest
from torch import Tensor

from lcdist.engines.engine import PendingLoss, StepLoss
from lcdist.engines.forward import MegatronForward
from tests.distributed import run_ranks
from tests.engines.internals import chunks_of, optimizer_of
from tests.model.small import Meshes, small, take_steps

MESHES = [("parallel.cp_size=2",), ("parallel.pp_size=2",), ("parallel.tp_size=2",)]
NAME = "decoder.layers.0.mlp.linear_fc2.weight"


def evaluate_both_ways(rank: int, world_size: int) -> list[tuple[StepLoss, StepLoss, StepLoss]]:
    """Return one batch's loss by mesh: of training, of its evaluation, of a forward engine."""
    meshes, found = Meshes(), []
    for mesh in MESHES:
        trainer = meshes.trainer(small(*mesh))
        layout, seqlen = trainer.plan.layout, trainer.plan.config.train.seqlen
        batches = trainer.loader.next_step()
        forward = MegatronForward(trainer.mesh, chunks_of(trainer))
        found.append(
            (
                trainer.engine.forward_backward(batches).value,
                trainer.engine.evaluate(batches, layout, seqlen),
                forward.evaluate(batches, layout, seqlen),
            )
        )
    return found


def test_evaluate_returns_the_training_loss_with_and_without_ddp() -> None:
    for losses in run_ranks(evaluate_both_ways, 2):
        for training, evaluation, forward in losses:
            assert evaluation == forward and training.tokens == evaluation.tokens == 4 * 64
            assert evaluation.mean == pytest.approx(training.mean, rel=1e-6)


def test_a_pending_loss_is_read_once_and_never_after_the_step_has_read_it() -> None:
    reads: list[None] = []
    loss = PendingLoss(lambda: reads.append(None) or StepLoss(2.0, 3))
    assert (loss.mean, loss.tokens, loss.value) == (2.0, 3, StepLoss(2.0, 3)) and len(reads) == 1
    loss = PendingLoss(lambda: reads.append(None) or StepLoss(2.0, 3))
    loss.settle(StepLoss(1.0, 5))
    assert (loss.mean, loss.tokens) == (1.0, 5) and len(reads) == 1


def waiting(rank: int, world_size: int) -> tuple[list[bool], bool, float]:
    """Return whether gradients were complete at each call of while_waiting, and in the end.

    Last, the norm of all gradients by that which the step returns.
    """
    trainer = Meshes().trainer(small("parallel.cp_size=2"))
    engine, seen = trainer.engine, list[Tensor]()
    engine.forward_backward(
        trainer.loader.next_step(), lambda: seen.append(engine.gradient(NAME).clone())
    )
    final = engine.gradient(NAME)
    names = [name for name, _ in optimizer_of(trainer).parameters]
    squares = [engine.gradient(name).double().square().sum() for name in names]
    ratio = float(sum(squares)) ** 0.5 / engine.step(1e-3)
    return [bool((g == final).all()) for g in seen], bool(final.count_nonzero()), ratio


def test_while_waiting_is_called_once_after_backward_and_gradients_are_means() -> None:
    for complete, is_filled, ratio in run_ranks(waiting, 2):
        assert complete == [True] and is_filled
        assert ratio == pytest.approx(1, rel=1e-6)


def replace_weights(rank: int, world_size: int) -> list[Any]:
    """Return what follows a change of weights: masters, an unknown name, the padded table."""
    trainer = Meshes().trainer(small("parallel.tp_size=2", "train.dtype=bf16"))
    take_steps(trainer, 1)
    engine, optimizer = trainer.engine, optimizer_of(trainer)
    [chunk] = chunks_of(trainer)
    weights = dict(chunk.named_parameters())
    table = weights["embedding.word_embeddings.weight"]
    before = table.detach().clone()
    whole = before.new_full((250, table.shape[1]), 0.5)
    calls: list[str] = []
    engine.load_adapter(
        {
            "embedding.word_embeddings.weight": lambda: whole,
            "decoder.layers.99.mlp.linear_fc2.weight": lambda: calls.append("read") or whole,
        }
    )
    real = min(250 - trainer.mesh.tp_rank * len(table), len(table))
    with pytest.raises(KeyError):
        engine.gradient("decoder.layers.99.mlp.linear_fc2.weight")
    pairs = zip(optimizer.mine, optimizer.masters, strict=True)
    return [
        bool((table[:real] == 0.5).all()),
        bool((table[real:] == before[real:]).all()),
        all(bool((m == p.float()).all()) for p, m in pairs),
        calls,
    ]


def test_load_adapter_fills_shards_keeps_padding_and_refreshes_masters() -> None:
    assert run_ranks(replace_weights, 2) == [[True, True, True, []]] * 2
