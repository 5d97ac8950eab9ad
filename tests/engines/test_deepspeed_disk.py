"""Offload to NVMe: the same losses, weights and moments as in the host's memory, and resumption."""

import contextlib
from pathlib import Path

import pytest

from lcdist.checkpoint.read import open_checkpoint
from lcdist.checkpoint.save import Checkpointer
from lcdist.hardware.deepspeed_on_cpu import has_async_io
from tests.distributed import run_ranks
from tests.engines.disk import disk_in_python
from tests.engines.internals import let_go
from tests.engines.test_deepspeed_checkpoint import Standing, standing
from tests.model.small import Meshes, small, take_steps

# DeepSpeed leaves tensors below a megabyte in memory: a rank's part of an MLP's first is larger.
SHAPE = (
    *("train.dtype=bf16", "model.num_layers=2", "model.hidden_size=256", "train.seqlen=64"),
    *("train.global_batch_size=2", "train.engine=deepspeed", "deepspeed.stage=3"),
)
HOST = ("deepspeed.offload_optimizer=cpu", "deepspeed.offload_parameters=cpu")
STATES = ("deepspeed.offload_optimizer=nvme",)
ALL = (*STATES, "deepspeed.offload_parameters=nvme")


def runs(rank: int, world_size: int, folder: Path, is_real: bool) -> dict[str, Standing]:
    """Return where runs stand after a few steps, and after the resumption of another's save."""
    meshes, found = Meshes(), {}
    shape = (*SHAPE, f"model.ffn_hidden_size={1024 * world_size}")
    disk = f"deepspeed.nvme_folder={folder / 'disk'}"
    written: dict[str, int] = {}
    with contextlib.nullcontext() if is_real else disk_in_python():
        for name, words in (("host", HOST), ("states", (disk, *STATES)), ("all", (disk, *ALL))):
            trainer = meshes.trainer(small(*shape, *words))
            take_steps(trainer, 2)
            trainer.checkpointer = Checkpointer(folder / name, keep_last=1)
            trainer.save()
            found[name] = standing(trainer)
            let_go(trainer)
            written[name] = len(list((folder / "disk").rglob(f"rank{rank}/*.swp")))
        assert 0 == written["host"] < written["states"] < written["all"]
        for name, source in (("resumed", "all"), ("from the host", "host")):
            trainer = meshes.trainer(small(*shape, disk, *ALL, "train.seed=3"))
            trainer.resume(open_checkpoint(folder / source))
            found[name] = standing(trainer)
            let_go(trainer)
    return found


def assert_all_alike(found: dict[str, Standing]) -> None:
    for name, stands in found.items():
        assert stands == found["host"], name


def test_what_lies_on_a_disk_trains_and_resumes_as_in_memory(tmp_path: Path) -> None:
    assert_all_alike(run_ranks(runs, 1, tmp_path, False)[0])


@pytest.mark.exhaustive
def test_two_ranks_have_a_part_each_on_disk(tmp_path: Path) -> None:
    assert_all_alike(run_ranks(runs, 2, tmp_path, False)[0])


@pytest.mark.exhaustive
def test_deepspeeds_own_reads_and_writes(tmp_path: Path) -> None:
    if not has_async_io():
        pytest.skip("DeepSpeed's async_io cannot be built here: libaio-dev is not installed")
    assert_all_alike(run_ranks(runs, 1, tmp_path, True, timeout=600)[0])
