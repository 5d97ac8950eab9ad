"""Write a run's step records: JSON lines, TensorBoard, Weights & Biases, terminal progress.

Rank 0 writes; other ranks have a `Metrics` without sinks. A run that resumes after step k first
deletes records of later steps, so that files look as if the run had never stopped.
"""

import importlib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from rich.console import Console

from lcdist.config.schema import Config
from lcdist.rundir.paths import METRICS_FILE
from lcdist.rundir.records import StepRecord, cut_records, line_of
from lcdist.train.progress import BarProgress, LineProgress
from lcdist.utils.errors import naming
from lcdist.utils.progress import console_of_log


class Sink(Protocol):
    """Destination of step records."""

    def write(self, record: StepRecord) -> None:
        """Write one step's record."""

    def close(self) -> None:
        """Flush pending output and release resources."""


class Metrics:
    """All sinks of a run, written and closed together; empty on ranks other than 0."""

    def __init__(self, sinks: Sequence[Sink]):
        self._sinks = tuple(sinks)

    def write(self, record: StepRecord) -> None:
        """Write one step's record to every sink."""
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class JsonLines:
    """Appends one JSON line per step to `path`; `write` flushes to the operating system."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def write(self, record: StepRecord) -> None:
        """Append the record."""
        with naming(self._path):
            self._file.write(line_of(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with naming(self._path):
            self._file.close()


class TensorBoard:
    """Writes scalars with `writer`, a torch.utils.tensorboard.SummaryWriter."""

    def __init__(self, writer: Any):
        self._writer = writer

    def write(self, record: StepRecord) -> None:
        """Add the record's finite numbers under its step and wall time."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.step, walltime=record.wall)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandB:
    """Logs scalars to `run`, the Weights & Biases run that `wandb.init` returned."""

    def __init__(self, run: Any):
        self._run = run

    def write(self, record: StepRecord) -> None:
        """Log the record's finite numbers under its step."""
        self._run.log(scalars(record), step=record.step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def open_metrics(
    config: Config, *, rank: int, step: int, run_id: str, console: Console | None = None
) -> Metrics:
    """Open the metrics of a run that continues after `step`.

    Args:
        config: of the run.
        rank: in the whole world; only rank 0 uses files and the terminal.
        step: steps taken so far; 0 for a new run.
        run_id: the id that `record_start` returned.
        console: for progress; None: standard output.

    Raises:
        ValueError: on every rank if log.wandb is set without the package wandb; on rank 0 if an
            existing metrics file is damaged.
    """
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "log.wandb = true, but the package wandb is not installed: "
            "pip install 'lcdist[wandb]', or set log.wandb = false"
        )
    if rank != 0:
        return Metrics([])
    folder = Path(config.log.folder)
    cut_records(folder / METRICS_FILE, step)
    sinks: list[Sink] = [JsonLines(folder / METRICS_FILE)]
    if config.log.tensorboard:
        # Imported on use: the import is slow, and other ranks do not need it.
        writer = _third_party("torch.utils.tensorboard").SummaryWriter(
            log_dir=str(folder / "tensorboard"), purge_step=step + 1, flush_secs=10
        )
        sinks.append(TensorBoard(writer))
    if config.log.wandb:
        run = _third_party("wandb").init(
            project=config.log.wandb_project,
            name=folder.name,
            dir=str(folder),
            id=run_id,
            resume="allow",
            config=asdict(config),
        )
        sinks.append(WandB(run))
    sinks.append(_progress(console or Console(), folder.name, config.train.steps, step))
    return Metrics(sinks)


def scalars(record: StepRecord) -> dict[str, float]:
    """Return the record's finite numbers by slash-separated names, which dashboards group."""
    table: dict[str, float | None] = {
        "train/loss": record.loss,
        "train/grad_norm": record.grad_norm,
        "train/lr": record.lr,
        "train/samples": record.samples,
        "speed/tokens_per_second": record.tokens_per_second,
        "speed/mfu_full": record.mfu_full,
        "speed/mfu_causal": record.mfu_causal,
        "memory/peak_bytes": record.memory_bytes,
        "time/step": record.time.step,
        "time/data": record.time.data,
        "time/forward_backward": record.time.forward_backward,
        "time/optimizer": record.time.optimizer,
        "time/other": record.time.other,
    }
    table |= {f"exchange/{verb}_bytes": sent for verb, sent in record.exchange_bytes.items()}
    return {k: float(v) for k, v in table.items() if v is not None and math.isfinite(v)}


def _progress(console: Console, name: str, steps: int, steps_taken: int) -> Sink:
    if console.is_terminal:
        return BarProgress(console_of_log(console), name, steps, steps_taken)
    return LineProgress(console, name, steps)


def _third_party(name: str) -> ModuleType:
    """Import a module that only some ranks or runs need."""
    return importlib.import_module(name)
