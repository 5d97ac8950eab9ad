"""The DeepSpeed engine trains as the Megatron engine does: every stage, mesh, method and option."""

import gc
from functools import cache
from typing import Any, NamedTuple

import pytest

from tests.distributed import run_ranks
from tests.engines.internals import let_go, spoil_gradients
from tests.model.small import Meshes, small, take_steps
from tests.model.whole import digest, gather_gradients, gather_moments, gather_weights
from tests.tolerance import relative_error

TP, CP, SP = "parallel.tp_size=2", "parallel.cp_size=2", "parallel.sequence_parallel=true"
TOLERANCE = 1e-5
TILES = ("train.mlp=tiled", "train.mlp_chunk=16", "train.loss=chunked", "train.loss_chunk=16")
LORA = ("lora.rank=4", "lora.lr_ratio=8.0")
CPU = ("deepspeed.offload_optimizer=cpu",)
ALL_CPU = (*CPU, "deepspeed.offload_parameters=cpu")
LONG = "train.seqlen=96"
METHODS = {
    "coca": ("attention.method=coca",),
    "scca": ("attention.method=scca", "attention.chunk_size=20"),
    "tensorized": ("attention.method=tensorized", "attention.modes=[6]"),
    "landmark": ("attention.method=landmark", "attention.block_size=6"),
    "lssar": ("attention.method=lssar", "attention.power=3"),
}


class Row(NamedTuple):
    """A stage of ZeRO on a mesh, with more words of the configuration for both engines."""

    world_size: int
    stage: int
    words: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = [word.split(".", 1)[1] for word in (*self.words, *self.offload)]
        return "-".join([f"{self.world_size}ranks", f"stage{self.stage}", *words])


# Each stage, each axis, each method, adapters, accumulation and clipping at least once.
DEFAULT = (
    Row(2, 0, ("optim.clip_norm=0.1",)),
    Row(2, 1, ("train.global_batch_size=6",)),
    Row(2, 2, ("model.tied_embeddings=true",), CPU),
    Row(2, 3, ("train.recompute=full",)),
    Row(2, 3, (CP, *TILES, "train.recompute=keep_attention", "model.tied_embeddings=true")),
    Row(2, 3, (TP, SP, "train.recompute=selective"), ALL_CPU),
    Row(2, 1, (TP, SP, *LORA)),
    Row(2, 3, (*LORA, "train.recompute=full")),
    Row(2, 2, (CP, *METHODS["scca"], LONG, "data.documents=pack")),
    Row(2, 3, (CP, *METHODS["tensorized"], LONG)),
    Row(2, 1, (CP, *METHODS["landmark"], LONG, "data.documents=pack")),
    Row(2, 2, (CP, *METHODS["lssar"], LONG)),
)


def matrix() -> tuple[Row, ...]:
    """Return the exhaustive rows: stages x meshes, and ways to save memory under ZeRO-3."""
    meshes: tuple[tuple[int, tuple[str, ...]], ...]
    meshes = (1, ()), (2, ()), (4, ()), (4, (CP,))
    rows = [Row(size, stage, words) for stage in range(4) for size, words in meshes]
    rows += [Row(4, stage, (TP, CP, SP)) for stage in (2, 3)]
    rows += [
        Row(2, stage, (*mesh, *LORA)) for stage, mesh in ((0, ()), (2, (TP, SP)), (3, (TP, SP)))
    ]
    rows += [
        Row(2, 3, ("train.recompute=full", *TILES)),
        Row(2, 3, ("train.recompute=full", TP, SP)),
    ]
    rows += [Row(2, 3, ("train.recompute=selective", *more)) for more in (TILES, LORA)]
    rows += [Row(2, 3, ("train.recompute=keep_attention", *more)) for more in ((TP, SP), LORA)]
    rows += [Row(2, 3, ("train.offload=host", "train.recompute=full"), ALL_CPU)]
    rows += [Row(4, 2, ("train.global_batch_size=8", "optim.clip_norm=0.2"), CPU)]
    rows += [Row(4, 3, (CP, *METHODS["coca"], LONG))]
    return tuple(row for row in rows if row not in DEFAULT)


MATRIX = matrix()
TIERS = [
    *(pytest.param("default", row, id=str(row)) for row in DEFAULT),
    *(pytest.param("matrix", row, id=str(row), marks=pytest.mark.exhaustive) for row in MATRIX),
]
# Fewer layers than the small model has.
SHAPE = ("model.num_layers=2",)


def steps_of(tier: str, row: Row) -> int:
    """Return how many steps are compared: a long curve for every stage on plain meshes."""
    if tier == "default":
        return 3
    return 20 if row.words in ((), (CP,)) else 6


class Found(NamedTuple):
    """(Loss, gradient norm) of each step, and whole tensors in the end; on rank 0."""

    numbers: list[tuple[float, float]]
    tensors: dict[str, dict[str, Any]]


def trained(meshes: Meshes, steps: int, *words: str) -> Found:
    trainer = meshes.trainer(small(*words))
    numbers = take_steps(trainer, steps - 1)
    loss = trainer.engine.forward_backward(trainer.loader.next_step())
    gradients = gather_gradients(trainer.engine)
    numbers.append((loss.mean, trainer.engine.step(1e-3)))
    tensors = {
        "gradients": gradients,
        "weights": gather_weights(trainer.engine),
        "moments": gather_moments(trainer.engine),
    }
    let_go(trainer)
    return Found(numbers, tensors)


def compared(rank: int, world_size: int, tier: str) -> dict[Row, list[tuple[Any, Any]]]:
    """Return numbers, and relative errors by tensor, for each row of this world size."""
    meshes, expected, found = Meshes(), dict[tuple[str, ...], Found](), {}
    rows = [r for r in (DEFAULT if tier == "default" else MATRIX) if r.world_size == world_size]
    for row in sorted(rows, key=lambda row: row.words):
        shared = (*SHAPE, f"train.global_batch_size={max(2, world_size)}", *row.words)
        steps = steps_of(tier, row)
        if row.words not in expected:
            expected = {row.words: trained(meshes, steps, *shared)}
        words = ("train.engine=deepspeed", f"deepspeed.stage={row.stage}", *row.offload)
        ours, other = expected[row.words], trained(meshes, steps, *shared, *words)
        errors = {}
        for kind, tensors in ours.tensors.items():
            assert tensors.keys() == other.tensors[kind].keys(), kind
            for name, tensor in tensors.items():
                errors[kind, name] = relative_error(other.tensors[kind][name], tensor)
        found[row] = (ours.numbers, other.numbers, errors)
        gc.collect()
    return found


@cache
def results(tier: str, world_size: int) -> dict[Row, Any]:
    return run_ranks(compared, world_size, tier, timeout=900 if tier == "matrix" else 300)[0]


@pytest.mark.parametrize(("tier", "row"), TIERS)
def test_trains_as_the_megatron_engine_does(tier: str, row: Row) -> None:
    ours, other, errors = results(tier, row.world_size)[row]
    for (loss, norm), (other_loss, other_norm) in zip(ours, other, strict=True):
        assert other_loss == pytest.approx(loss, rel=TOLERANCE)
        assert other_norm == pytest.approx(norm, rel=TOLERANCE)
    # AdamW divides by the root of tiny second moments: after steps they differ more than losses.
    limits = {"gradients": 1e-4, "weights": 1e-4, "moments": 1e-3}
    worst = {kind: max((e, n) for (k, n), e in errors.items() if k == kind) for kind in limits}
    for kind, limit in limits.items():
        assert worst[kind][0] < limit, (kind, worst[kind])


STAGES = (("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3))


def refused(rank: int, world_size: int) -> dict[tuple[str, int], tuple[str, bool]]:
    """Return, for each dtype and stage, what a step with NaN in a gradient says and leaves."""
    meshes, found = Meshes(), {}
    for dtype, stage in STAGES:
        words = ("train.engine=deepspeed", f"deepspeed.stage={stage}", f"train.dtype={dtype}")
        trainer = meshes.trainer(small(*words))
        take_steps(trainer, 1)
        before = digest(gather_weights(trainer.engine)), digest(gather_moments(trainer.engine))
        # One rank's alone: all have to refuse.
        spoil_gradients(trainer, rank == world_size - 1)
        loss = trainer.engine.forward_backward(trainer.loader.next_step())
        assert loss.mean < 10
        with pytest.raises(FloatingPointError) as error:
            trainer.engine.step(1e-3)
        after = digest(gather_weights(trainer.engine)), digest(gather_moments(trainer.engine))
        found[dtype, stage] = str(error.value), before == after
        let_go(trainer)
    return found


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    for of_rank in run_ranks(refused, 2):
        for case, (message, is_unchanged) in of_rank.items():
            assert "gradient norm is" in message and is_unchanged, (case, message)
