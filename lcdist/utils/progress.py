"""Show how far a command is: a bar on terminals, occasional lines in files and pipes."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

# Called with what is done, how much of it is done so far, and the total.
Progress = Callable[[str, int, int], None]
# A file gets a line of a stage every so many seconds.
LINE_SECONDS = 10.0
BYTES, TOKENS = "B", "tokens"


def silent(what: str, completed: int, total: int) -> None:
    """Show nothing."""


def counter(what: str, total: int, progress: Progress, completed: int = 0) -> Callable[[int], None]:
    """Return a function that adds what it is called with to `completed`, and shows the sum."""
    progress(what, completed, total)

    def count(more: int) -> None:
        nonlocal completed
        completed += more
        progress(what, completed, total)

    return count


@contextlib.contextmanager
def show_progress(
    unit: str, console: Console, is_shown: bool = True, seconds: float = LINE_SECONDS
) -> Iterator[Progress]:
    """Yield a function to call with the progress; what it is first called with begins a stage.

    Args:
        unit: BYTES, TOKENS or another word.
        console: where to show it; see `progress_console`.
        is_shown: False on ranks that show nothing.
        seconds: between two lines in a file.
    """
    if not is_shown:
        yield silent
    elif console.is_terminal:
        with Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=console,
        ) as bar:
            yield _Bars(bar, unit)
    else:
        yield _Lines(console, unit, seconds)


def progress_console() -> Console:
    """Return the console for progress: standard error, as standard output has the result."""
    plain = Console(file=sys.stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)
    return console_of_log(plain)


def console_of_log(default: Console) -> Console:
    """Return the console that log messages go to on a terminal, else `default`.

    A bar has to share it: otherwise a message would be written behind the bar, in its line.
    """
    for handler in logging.getLogger().handlers:
        if isinstance(handler, RichHandler):
            return handler.console
    return default


@dataclass
class _Stage:
    """A stage that began at `began` with `first` done."""

    what: str
    began: float
    first: int

    def numbers(self, completed: int, total: int, unit: str) -> str:
        """Return share, amount, rate and time left."""
        seconds, done = time.monotonic() - self.began, completed - self.first
        text = f"{100 * completed / max(1, total):.0f} %  "
        done_text = count_text(completed, BYTES) if unit == BYTES else short_number(completed)
        text += f"{done_text} of {count_text(total, unit)}"
        if done <= 0 or seconds <= 0:
            return text
        rate = done / seconds
        return f"{text}  {count_text(rate, unit)}/s  {clock((total - completed) / rate)} left"


class _Bars:
    """One bar, which begins again with each stage."""

    def __init__(self, bar: Bar, unit: str) -> None:
        self._bar, self._unit = bar, unit
        self._stage: _Stage | None = None
        self._task: TaskID | None = None

    def __call__(self, what: str, completed: int, total: int) -> None:
        if self._stage is None or self._stage.what != what:
            self._stage = _Stage(what, time.monotonic(), completed)
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what, total=total, numbers="")
        assert self._task is not None
        numbers = self._stage.numbers(completed, total, self._unit)
        self._bar.update(self._task, completed=completed, total=total, numbers=numbers)


class _Lines:
    """A line every so many seconds, for a stage that takes as long."""

    def __init__(self, console: Console, unit: str, seconds: float) -> None:
        self._console, self._unit, self._seconds = console, unit, seconds
        self._stage: _Stage | None = None
        self._next = time.monotonic() + seconds

    def __call__(self, what: str, completed: int, total: int) -> None:
        now = time.monotonic()
        if self._stage is None or self._stage.what != what:
            self._stage = _Stage(what, now, completed)
        if now >= self._next:
            self._next = now + self._seconds
            self._console.print(f"{what}  {self._stage.numbers(completed, total, self._unit)}")


def count_text(count: float, unit: str) -> str:
    """Return an amount with its unit: "1.23 GB", "12.3k tokens", "1 token", "0.25 tokens"."""
    if unit == BYTES:
        for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if count >= size:
                return f"{count / size:.3g} {prefix}B" if count < 1e12 else f"{count / 1e9:,.0f} GB"
        return f"{count:.0f} B"
    return f"{short_number(count)} {unit.removesuffix('s') if count == 1 else unit}"


def short_number(count: float) -> str:
    """Return a number with three digits or so: 1.23M, 12.3k, 123, 0.25."""
    if count >= 1e6:
        return f"{count / 1e6:.2f}M"
    if count >= 1e3:
        return f"{count / 1e3:.1f}k"
    return f"{count:.0f}" if count >= 100 or count == int(count) else f"{count:.2g}"


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss or m:ss."""
    if not 0 <= seconds < 1e8:
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
