"""Show a run's progress: a bar on terminals, occasional lines in files and pipes."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lcdist.rundir.records import StepRecord
from lcdist.utils.progress import LINE_SECONDS, clock, short_number


class BarProgress:
    """Progress bar with step, loss, tokens per second and remaining time, for terminals."""

    def __init__(self, console: Console, name: str, steps: int, steps_taken: int = 0):
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=console,
            refresh_per_second=4,
            expand=True,
        )
        self._task = self._progress.add_task(name, total=steps, completed=steps_taken, numbers="")
        self._progress.start()

    def write(self, record: StepRecord) -> None:
        """Move the bar to the record's step."""
        self._progress.update(self._task, completed=record.step, numbers=_numbers(record))

    def close(self) -> None:
        """Stop updating the bar and release the terminal."""
        self._progress.stop()


class LineProgress:
    """Prints lines at the first and last step and every `seconds` between, for files and pipes."""

    def __init__(self, console: Console, name: str, steps: int, seconds: float = LINE_SECONDS):
        self._console = console
        self._name = name
        self._steps = steps
        self._seconds = seconds
        self._next = 0.0

    def write(self, record: StepRecord) -> None:
        """Print the record's step if the interval has passed or the step is the last."""
        now = time.monotonic()
        if now < self._next and record.step != self._steps:
            return
        self._next = now + self._seconds
        left = clock((self._steps - record.step) * record.time.step)
        self._console.print(
            f"{self._name}  step {record.step}/{self._steps}  {_numbers(record)}  {left} left",
            markup=False,
            emoji=False,
            highlight=False,
            soft_wrap=True,
        )

    def close(self) -> None:
        """Do nothing."""


def _numbers(record: StepRecord) -> str:
    return f"loss {record.loss:.4f}  {short_number(record.tokens_per_second)} tokens/s"
