"""The stages of a configuration, one run after another in one world.

The folder of the whole holds the stages' run folders and the marks that a batch script reads: DONE
when the last stage is, STOPPED when any was stopped. A start goes on in the stage that is not done.
"""

import gc
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lcdist.commands.train import run
from lcdist.config import ConfigError
from lcdist.config.stages import Stage
from lcdist.distributed.mesh import end_mesh, start_world, world_size
from lcdist.distributed.rank_zero import run_on_rank_zero
from lcdist.plan import make_plan
from lcdist.rundir.paths import latest_in
from lcdist.rundir.signals import STOP, clear_signals, steps_done, write_done, write_stopped
from lcdist.train.trainer import Outcome

log = logging.getLogger(__name__)


def run_stages(stages: Sequence[Stage], console: Console | None = None) -> Outcome:
    """Train stage after stage; returns how the last that was started ended.

    Raises ConfigError for what is wrong with any stage before the first begins, and as `run` does.
    """
    if not stages[0].name:
        return run(stages[0].config, console)
    _plan_all(stages)
    start_world(stages[0].config.parallel.timeout)
    folder = Path(stages[0].config.log.folder).parent
    run_on_rank_zero(lambda: clear_signals(folder) if folder.exists() else None)
    outcome = None
    for number, stage in enumerate(stages, 1):
        own, steps = Path(stage.config.log.folder), stage.config.train.steps
        done = run_on_rank_zero(lambda own=own: steps_done(own))
        if done is not None and done >= steps:
            outcome = Outcome("finished", done, f"all {steps} steps were done before")
            continue
        log.info("stage %d of %d: %s, in %s", number, len(stages), stage.name, own)
        outcome = run(stage.config, console, also_stop=folder / STOP)
        if outcome.status != "finished":
            reason = f"stage {stage.name}: {outcome.reason}"
            run_on_rank_zero(
                lambda own=own, at=outcome.step, why=reason: _stopped(folder, own, at, why)
            )
            return replace(outcome, reason=reason)
        # The next stage may have another mesh, and needs the memory.
        end_mesh()
        gc.collect()
    assert outcome is not None, "there is a stage"
    run_on_rank_zero(lambda: write_done(folder, outcome.step))
    return replace(outcome, reason=f"all {len(stages)} stages are done")


def _plan_all(stages: Sequence[Stage]) -> None:
    errors: list[str] = []
    for stage in stages:
        try:
            make_plan(stage.config, world_size())
        except ConfigError as error:
            errors += [f"stage '{stage.name}': {line}" for line in error.errors]
    if errors:
        raise ConfigError(errors)


def _stopped(folder: Path, own: Path, step: int, reason: str) -> None:
    newest = latest_in(own / "checkpoints")
    assert newest is not None, "a stopped run has saved"
    write_stopped(folder, step, reason, newest)
