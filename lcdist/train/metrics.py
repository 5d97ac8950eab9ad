"""Where the numbers of a run go: a JSON line a step, TensorBoard, Weights & Biases, a terminal.

Rank 0 writes, the others hold an object of the same interface that does nothing. A run resumed
after step k first forgets what the files say of later steps, so they end as if nothing happened.
"""

import importlib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol

from rich.console import Console

from lcdist.config.schema import Config
from lcdist.rundir.paths import METRICS_FILE
from lcdist.rundir.records import StepRecord, cut_records
from lcdist.train.progress import BarProgress, LineProgress


class Sink(Protocol):
    """A place that step records go to."""

    def write(self, record: StepRecord) -> None:
        """Take one step's record."""

    def close(self) -> None:
        """Finish what is pending and let go."""


class Metrics:
    """All the sinks of a run, written together and closed together; none on ranks other than 0."""

    def __init__(self, sinks: Sequence[Sink]):
        self._sinks = tuple(sinks)

    def write(self, record: StepRecord) -> None:
        """Give every sink one step's record."""
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class JsonLines:
    """One JSON line a step, appended to `path`; handed to the system before `write` returns."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: StepRecord) -> None:
        """Append the record."""
        self._file.write(record.to_json() + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Scalars in TensorBoard's format. writer: a torch.utils.tensorboard.SummaryWriter."""

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
    """A Weights & Biases run. run: what `wandb.init` returned."""

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
    """The metrics of a run that starts after `step` (0: from its beginning).

    rank: in the whole world; only rank 0 touches files or the terminal. run_id: what
    `record_start` returned on rank 0. console: where progress is shown; None: standard output.
    Raises ValueError, on every rank, where W&B is asked for and not installed, and on rank 0
    where an existing metrics file is broken.
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
        # Imported late: it is slow, and other ranks do not need it.
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
    """The record's finite numbers by slash-separated names, as dashboards group them."""
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


def _progress(console: Console, name: str, steps: int, done: int) -> Sink:
    if console.is_terminal:
        return BarProgress(console, name, steps, done)
    return LineProgress(console, name, steps)


def _third_party(name: str) -> ModuleType:
    """The one place where a module that not every rank or run needs is imported."""
    return importlib.import_module(name)
