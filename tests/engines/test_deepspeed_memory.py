"""Compare the bytes that a rank holds under each stage of ZeRO with the plan."""

import gc
from typing import NamedTuple

import pytest
import torch

from lcdist.plan import zero
from tests.distributed import run_ranks
from tests.live import LiveTensors
from tests.model.small import Meshes, small

TOLERANCE = 0.05
# States are most of what is held: few tokens, and small buckets.
SHORT = ("train.seqlen=16", "train.loss=chunked", "model.vocab_size=1000")
SMALL = (
    *("model.hidden_size=320", "model.ffn_hidden_size=640", "model.num_layers=6"),
    *("deepspeed.reduce_bucket_elements=600000", "deepspeed.gather_bucket_elements=600000"),
)
# 101 million parameters.
LARGE = (
    *("model.hidden_size=768", "model.ffn_hidden_size=2048", "model.num_layers=14"),
    *("model.nheads=12", "model.nheads_kv=12"),
    *("deepspeed.reduce_bucket_elements=4000000", "deepspeed.gather_bucket_elements=4000000"),
)
STAGES = (("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3))


class Held(NamedTuple):
    """Bytes between steps and at most, measured and planned; planned ones of the host."""

    rest: int
    peak: int
    planned_rest: int
    planned_peak: int
    planned_host: int


def storages() -> dict[int, torch.UntypedStorage]:
    """Return the memory of all living tensors, by its address."""
    gc.collect()
    found = (
        x.untyped_storage()
        for x in gc.get_objects()
        if type(x) in (torch.Tensor, torch.nn.Parameter) and not x.is_meta
    )
    return {x._cdata: x for x in found if x.nbytes()}


def held(rank: int, world_size: int, cases: list[tuple[str, ...]]) -> list[Held]:
    meshes, found = Meshes(), []
    for words in cases:
        # What an earlier engine has left is kept, so that no address is used again.
        before = storages()
        trainer = meshes.trainer(small("train.engine=deepspeed", *words))
        live = LiveTensors()
        live.watch([x for key, x in storages().items() if key not in before])
        for _ in range(2):
            batches = trainer.loader.next_step()
            with live:
                trainer.engine.forward_backward(batches)
                trainer.engine.step(1e-3)
            del batches
        rest = sum(x.nbytes() for key, x in storages().items() if key not in before)
        memory = trainer.plan.memory
        assert memory.zero is not None
        planned = memory.zero.at_rest, memory.device_bytes, memory.zero.offloaded_bytes
        found.append(Held(rest, live.peak, *planned))
        engine = trainer.engine
        engine.engine.destroy()
        del trainer, engine, before
    return found


def check(size: tuple[str, ...], world_size: int, stages: tuple[tuple[str, int], ...]) -> None:
    cases = [(f"train.dtype={d}", f"deepspeed.stage={n}", *SHORT, *size) for d, n in stages]
    ranks = run_ranks(held, world_size, cases, timeout=900)
    wrong = []
    for number, (dtype, stage) in enumerate(stages):
        for of_rank in ranks[:1]:
            one = of_rank[number]
            row = [f"{count / 1e6:.1f}" for count in one[:4]]
            print(f"| {dtype}, ZeRO-{stage} | {' | '.join(row)} |")
            for measured, planned in ((one.rest, one.planned_rest), (one.peak, one.planned_peak)):
                if measured != pytest.approx(planned, rel=TOLERANCE):
                    wrong.append((dtype, stage, measured / planned))
    assert not wrong


def test_states_are_what_the_plan_says() -> None:
    check(SMALL, 2, STAGES[3:])


def offloaded(rank: int, world_size: int, cases: list[tuple[str, ...]]) -> list[Held]:
    # Nothing is pinned on a CPU, and so nothing is rounded.
    zero.pinned_bytes = lambda count: count
    return held(rank, world_size, cases)


@pytest.mark.exhaustive
def test_offloaded_states_are_what_the_plan_says() -> None:
    ways = [(2, "none"), (3, "none"), (3, "cpu")]
    cases = [
        (
            *("train.dtype=bf16", f"deepspeed.stage={stage}", "train.global_batch_size=2"),
            *("deepspeed.offload_optimizer=cpu", f"deepspeed.offload_parameters={where}"),
            *(*SHORT, *SMALL),
        )
        for stage, where in ways
    ]
    # On a CPU, device and host have one memory.
    for found in run_ranks(offloaded, 2, cases)[0]:
        assert found.rest == pytest.approx(found.planned_rest + found.planned_host, rel=0.01)


@pytest.mark.exhaustive
def test_fp32_states_are_what_the_plan_says() -> None:
    check(SMALL, 2, (("fp32", 0), *STAGES[:3]))


@pytest.mark.exhaustive
def test_states_of_101_million_parameters_are_what_the_plan_says() -> None:
    check(LARGE, 4, STAGES[3:])
