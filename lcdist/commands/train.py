"""Assemble and run a training run, from a configuration to the last checkpoint."""

import logging
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from torch import Tensor

from lcdist.checkpoint.read import Checkpoint
from lcdist.config.schema import Config
from lcdist.convert.lora.adapter import check_adapter, read_adapter
from lcdist.distributed.mesh import build_mesh, least_of_ranks, start_world, world_size
from lcdist.distributed.rank_zero import enter_on_rank_zero, run_on_rank_zero
from lcdist.hardware.determinism import make_deterministic
from lcdist.hardware.peak import device_peak
from lcdist.model.build import DTYPES
from lcdist.plan import make_plan
from lcdist.rundir.lock import lock_run_folder
from lcdist.train.build import build_trainer, open_dataset
from lcdist.train.compile_ahead import compile_ahead
from lcdist.train.failure import failure_told
from lcdist.train.loop import record_outcome, train_loop
from lcdist.train.resume import begin_at, choose_start, restore_weights
from lcdist.train.trainer import Outcome
from lcdist.verify.preflight import check_host_memory, check_start

log = logging.getLogger(__name__)


def run(config: Config, console: Console | None = None, also_stop: Path | None = None) -> Outcome:
    """Train as `config` says in the launcher's world; resume the run in its folder if there is one.

    Args:
        config: of the whole run.
        console: where rank 0 shows progress; None: standard output.
        also_stop: a file that requests a stop, beside `stop` in the run folder.

    Raises:
        ConfigError, ValueError, CheckpointError: the run cannot start. Nothing is overwritten.
    """
    plan = make_plan(config, world_size())
    make_deterministic(config.train.deterministic)
    start_world(config.parallel.timeout)
    mesh = build_mesh(config.parallel, config.train.seed)
    folder = Path(config.log.folder)
    dataset = open_dataset(plan)
    start = choose_start(config, lambda: _check_new_run(config))
    checkpoint = start.checkpoint
    with enter_on_rank_zero(lock_run_folder(folder)), failure_told(folder, mesh.rank):
        run_on_rank_zero(lambda: begin_at(folder, start))
        if checkpoint is not None and checkpoint.step >= config.train.steps:
            return _finish(folder, checkpoint.step, config.train.steps)
        check_start(folder, plan.memory.checkpoint_bytes)
        plan = plan.with_device_memory(least_of_ranks(plan.hardware.memory_bytes))
        plan = check_host_memory(plan)
        peak = device_peak(mesh.device, DTYPES[plan.dtype], config.log.peak_tflops)
        with compile_ahead(plan, mesh):
            trainer = build_trainer(plan, mesh, dataset, peak)
            restore_weights(trainer, checkpoint, _adapter_tensors(config, checkpoint))
        trainer.also_stop = [also_stop] if also_stop is not None else []
        return train_loop(trainer, console)


def _check_new_run(config: Config) -> None:
    """Check the adapter that a new run starts from."""
    if config.lora.load:
        check_adapter(Path(config.lora.load), config)


def _finish(folder: Path, step: int, steps: int) -> Outcome:
    """Record a run that has taken all its steps: a kill after its last save left it unrecorded."""
    outcome = Outcome("finished", step, f"all {steps} steps were done before")
    run_on_rank_zero(lambda: record_outcome(folder, outcome))
    return outcome


def _adapter_tensors(
    config: Config, checkpoint: Checkpoint | None
) -> dict[str, Callable[[], Tensor]]:
    """Return the tensors of lora.load for a new run; none for a resumed one."""
    if checkpoint is not None or not config.lora.load:
        return {}
    return read_adapter(Path(config.lora.load), config)
