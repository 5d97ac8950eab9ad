"""Run the training loop with all that is recorded of it: metrics, status, header, watchdog."""

import contextlib
import logging
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from lcdist.checkpoint.save import Checkpointer
from lcdist.distributed.rank_zero import run_on_rank_zero
from lcdist.distributed.store import shared_store
from lcdist.distributed.watchdog import Watchdog
from lcdist.hardware.device import device_name
from lcdist.plan import plan_rows
from lcdist.rundir.header import (
    LostWork,
    RunHeader,
    lost_work,
    process_began,
    record_first_step,
    record_spent,
    record_start,
    versions,
)
from lcdist.rundir.paths import METRICS_FILE, CheckpointError, latest_in
from lcdist.rundir.run_config import write_config
from lcdist.rundir.signals import clear_signals, write_done, write_stopped
from lcdist.rundir.status import stage_folders, write_status
from lcdist.train.metrics import open_metrics
from lcdist.train.trainer import Outcome, Trainer
from lcdist_kernels.extensions import used as used_extensions

log = logging.getLogger(__name__)


def train_loop(trainer: Trainer, console: Console | None) -> Outcome:
    """Train to the end or to a stop request, and record start, steps and outcome in the run folder.

    All ranks call it, holding the run folder's lock. console: for progress; None: standard output.
    """
    config, mesh = trainer.plan.config, trainer.mesh
    folder = Path(config.log.folder)
    reason = "resumed" if trainer.step else "new run"
    run_id = run_on_rank_zero(lambda: _record_start(trainer, folder, reason))
    trainer.checkpointer.on_saved = partial(_record_spent, folder, trainer.checkpointer, mesh.rank)
    metrics = open_metrics(
        config, rank=mesh.rank, step=trainer.step, run_id=run_id, console=console
    )
    with metrics, build_watchdog(trainer) as watchdog:
        try:
            outcome = trainer.train(
                metrics,
                watchdog,
                lambda record: _record_first_step(folder, mesh.rank, record.time.step),
            )
        except Exception:
            # What is being saved is whole. Of several ranks, others may be in a step.
            if mesh.world_size == 1:
                with contextlib.suppress(CheckpointError, OSError):
                    trainer.complete_save()
            raise
        finally:
            _record_spent(folder, trainer.checkpointer, mesh.rank)
    run_on_rank_zero(lambda: record_outcome(folder, outcome))
    return outcome


def _record_start(trainer: Trainer, folder: Path, reason: str) -> str:
    """Write the run folder's config, status and header; return the run's id."""
    lost = lost_work(folder / METRICS_FILE, trainer.step) if trainer.step else LostWork()
    if lost.steps:
        log.warning("%d steps, %.0f s of work, are done again", lost.steps, lost.seconds)
    clear_signals(folder)
    write_config(folder, trainer.plan.config)
    write_status(folder, "running", trainer.step, reason)
    header = RunHeader(
        plan=dict(plan_rows(trainer.plan)),
        device=device_name(trainer.mesh.device),
        peak=asdict(trainer.peak),
        world_size=trainer.mesh.world_size,
        versions=versions(),
        kernels=", ".join([trainer.plan.config.train.kernels, *used_extensions()]),
    )
    # A stage begins where the one before it ended.
    stages = [path for path in stage_folders(folder.parent) if path != folder]
    lost = replace(lost, began=process_began(stages if trainer.also_stop else ()))
    return record_start(folder, header, trainer.step, reason, lost)


def _record_first_step(folder: Path, rank: int, seconds: float) -> None:
    """Record on rank 0 how long this process took to the end of its first step of `seconds`."""
    if rank == 0:
        record_first_step(folder, seconds)


def _record_spent(folder: Path, checkpointer: Checkpointer, rank: int) -> None:
    """Record on rank 0 that the run is alive and how long it has saved, as far as it can."""
    if rank == 0:
        with contextlib.suppress(OSError, ValueError):
            record_spent(folder, checkpointer.seconds)


def build_watchdog(trainer: Trainer) -> Watchdog:
    """Build the watchdog, which reports which rank is stuck and in which collective."""
    parallel, mesh = trainer.plan.config.parallel, trainer.mesh
    folder = Path(trainer.plan.config.log.folder)
    methods = dict.fromkeys(layer.method for layer in trainer.plan.layers)

    def report_stall(report: str) -> None:
        for line in report.splitlines():
            log.error("watchdog: %s", line)
        write_status(folder, "stalled", trainer.step, report)

    return Watchdog(
        shared_store("watchdog"),
        mesh.rank,
        mesh.world_size,
        stall_limit=parallel.stall,
        slow_limit=parallel.timeout,
        step=trainer.step,
        methods={method.module: method.name for method in methods},
        on_stall=report_stall,
    )


def record_outcome(folder: Path, outcome: Outcome) -> None:
    """Write the run's final status, and the signal file DONE or STOPPED."""
    write_status(folder, outcome.status, outcome.step, outcome.reason)
    if outcome.status == "finished":
        write_done(folder, outcome.step)
    else:
        newest = latest_in(folder / "checkpoints")
        assert newest is not None, "a stopped run has saved"
        write_stopped(folder, outcome.step, outcome.reason, newest)
