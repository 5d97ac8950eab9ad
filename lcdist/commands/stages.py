"""`lcdist train`: the stages of a configuration, one run after another in one world.

A configuration without `[[stages]]` is one run. The folder of several stages holds their run
folders and the signal files that a batch script reads: DONE when the last stage is finished,
STOPPED when any stage was stopped. A start continues in the first unfinished stage.
"""

import argparse
import gc
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lcdist.commands import train
from lcdist.commands.arguments import add_config
from lcdist.config import ConfigError
from lcdist.config.stages import Stage
from lcdist.distributed.mesh import end_mesh, end_world, start_world, world_size
from lcdist.distributed.rank_zero import run_on_rank_zero
from lcdist.plan import make_plan
from lcdist.rundir.paths import CHECKPOINTS, latest_in
from lcdist.rundir.signals import STOP, clear_signals, steps_done, write_done, write_stopped
from lcdist.rundir.source import load_run
from lcdist.train.trainer import Outcome

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the configuration."""
    add_config(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train all stages, and log how the run ended."""
    try:
        outcome = run_stages(load_run(arguments.config, arguments.overrides))
    finally:
        end_world()
    log.info("%s: %s", outcome.status, outcome.reason)
    return 0


def run_stages(stages: Sequence[Stage], console: Console | None = None) -> Outcome:
    """Train stage after stage, and return the outcome of the last one that was started.

    Args:
        stages: of one configuration, in order.
        console: where rank 0 shows progress; None: standard output.

    Raises:
        ConfigError: any stage has a mistake; raised before the first stage begins.
        ValueError: as `lcdist.commands.train.run`.
    """
    if not stages[0].name:
        return train.run(stages[0].config, console)
    _plan_all(stages)
    start_world(stages[0].config.parallel.timeout)
    folder = Path(stages[0].config.log.folder).parent
    run_on_rank_zero(lambda: clear_signals(folder) if folder.exists() else None)
    outcome = None
    for number, stage in enumerate(stages, 1):
        stage_folder, steps = Path(stage.config.log.folder), stage.config.train.steps
        finished_steps = run_on_rank_zero(lambda path=stage_folder: steps_done(path))
        if finished_steps is not None and finished_steps >= steps:
            outcome = Outcome("finished", finished_steps, f"all {steps} steps were done before")
            continue
        log.info("stage %d of %d: %s, in %s", number, len(stages), stage.name, stage_folder)
        outcome = train.run(stage.config, console, also_stop=folder / STOP)
        if outcome.status != "finished":
            outcome = replace(outcome, reason=f"stage {stage.name}: {outcome.reason}")
            _record_stopped(folder, stage_folder, outcome)
            return outcome
        # The next stage may have another mesh, and needs the memory.
        end_mesh()
        gc.collect()
    assert outcome is not None, "a configuration has at least one stage"
    run_on_rank_zero(lambda: write_done(folder, outcome.step))
    return replace(outcome, reason=f"all {len(stages)} stages are done")


def _plan_all(stages: Sequence[Stage]) -> None:
    """Raise ConfigError with the mistakes of all stages."""
    errors: list[str] = []
    for stage in stages:
        try:
            make_plan(stage.config, world_size())
        except ConfigError as error:
            errors += [f"stage '{stage.name}': {line}" for line in error.errors]
    if errors:
        raise ConfigError(errors)


def _record_stopped(folder: Path, stage_folder: Path, outcome: Outcome) -> None:
    """Write STOPPED into the folder of all stages; all ranks call this together."""

    def write() -> None:
        newest = latest_in(stage_folder / CHECKPOINTS)
        assert newest is not None, "a stopped run has saved a checkpoint"
        write_stopped(folder, outcome.step, outcome.reason, newest)

    run_on_rank_zero(write)
