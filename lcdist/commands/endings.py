"""Decide how a command ends after an error: its exit status, and what is printed once and last.

Under `launch/run.py` a rank hands its lines to the launcher, which prints those of the first cause.
Otherwise a rank prints them itself.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lcdist.commands.wording import in_words_of
from lcdist.config.load import ConfigError
from lcdist.utils.errors import RankError, is_of_rank_zero, os_error_text

CRASH, USER_ERROR, INTERRUPTED, CLOSED_OUTPUT = 1, 2, 130, 141
# Variables of the environment: the folder in which ranks leave their reports for the launcher, the
# folder of the ranks' own logs, and the command that was typed.
REPORTS, RANK_LOGS, STARTER = "LCDIST_REPORTS", "LCDIST_RANK_LOGS", "LCDIST_STARTER"
# How long a rank that finds what rank 0 finds waits to be ended by its launcher, in seconds.
PATIENCE = 5.0
ALLOCATOR = "DefaultCPUAllocator"
MEMORY_REMEDY = (
    "set train.recompute=full, train.micro_batch_size=1 or a smaller train.seqlen, or share a "
    "sequence among more ranks with parallel.cp_size"
)


@dataclass(frozen=True)
class Report:
    """Record how one rank ended.

    Attributes:
        rank: number of the rank.
        status: exit status.
        lines: what is to be printed.
        alike: whether all ranks find the same, so that one of them is enough.
        time: seconds since 1970.
        is_on_console: whether the rank has printed the lines where the launcher prints.
    """

    rank: int
    status: int
    lines: list[str]
    alike: bool
    time: float
    is_on_console: bool = False

    @property
    def is_crash(self) -> bool:
        """Return whether the error was no mistake of the user."""
        return self.status == CRASH

    def shown(self) -> list[str]:
        """Return the lines, with the rank if others may have ended in another way."""
        prefix = "" if self.alike or self.is_crash or not self.rank else f"rank {self.rank}: "
        return [prefix + line for line in self.lines]


def end_with(error: BaseException, environment: Mapping[str, str], debug: bool) -> int:
    """Print or hand over what the user has to know of an error, and return the exit status.

    Args:
        error: what a command raised.
        environment: of the process.
        debug: add the traceback of a user's mistake.

    Raises:
        BaseException: `error` itself, if it is no mistake of the user and this is the only rank:
            Python prints its traceback.
    """
    if _is_closed_output(error):
        # Python would complain when it flushes the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return CLOSED_OUTPUT
    number = environment.get("RANK", "")
    rank = int(number) if number.isdecimal() else None
    report = report_of(error, rank or 0, environment.get(STARTER, ""), debug)
    if report is None and rank is None:
        raise error
    _deliver(report or _crash(error, rank or 0), rank, environment)
    return report.status if report else CRASH


def report_of(
    error: BaseException, rank: int, starter: str = "", debug: bool = False
) -> Report | None:
    """Return the report of an error that has an explanation; None for a crash."""
    if isinstance(error, KeyboardInterrupt):
        return Report(rank, INTERRUPTED, ["interrupted"], True, time.time())
    memory = _memory_text(error)
    if memory:
        lines, alike = [f"error: {memory}; {MEMORY_REMEDY}"], False
    elif _is_mistake(error):
        lines = [in_words_of(starter, line) for line in _mistake_lines(error)]
        alike = is_of_rank_zero(error) or not isinstance(error, RankError | OSError)
    else:
        return None
    if debug:
        lines = [*"".join(traceback.format_exception(error)).splitlines(), *lines]
    return Report(rank, USER_ERROR, lines, alike, time.time())


def read_reports(folder: Path) -> list[Report]:
    """Return the reports in a folder, by rank."""
    files = sorted(folder.glob("*.json"), key=lambda file: int(file.stem))
    return [Report(**json.loads(file.read_text(encoding="utf-8"))) for file in files]


def _deliver(report: Report, rank: int | None, environment: Mapping[str, str]) -> None:
    """Hand the report to the launcher, or print it if there is none that takes it."""
    folder = environment.get(REPORTS)
    if folder and rank is not None:
        file = Path(folder, f"{rank}.json")
        part = file.with_suffix(".part")
        # The launcher prints what it reads from the log of its first rank.
        table = asdict(report)
        table["is_on_console"] = RANK_LOGS in environment and environment.get("LOCAL_RANK") == "0"
        part.write_text(json.dumps(table), encoding="utf-8")
        part.replace(file)
        if RANK_LOGS not in environment:
            return
    if report.alike and report.rank:
        # torchrun would end rank 0 with this one, perhaps before it has printed its line.
        time.sleep(PATIENCE if "TORCHELASTIC_RUN_ID" in environment and not folder else 0)
        return
    for line in report.shown():
        print(line, file=sys.stderr)


def _crash(error: BaseException, rank: int) -> Report:
    lines = "".join(traceback.format_exception(error)).splitlines()
    return Report(rank, CRASH, [f"rank {rank} crashed:", *lines], False, time.time())


def _is_closed_output(error: BaseException) -> bool:
    """Return whether the reader of standard output has gone, as `head` does."""
    if isinstance(error, SystemExit):
        # rich ends the process by itself.
        return isinstance(error.__context__, BrokenPipeError)
    if not isinstance(error, BrokenPipeError):
        return False
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


def _is_mistake(error: BaseException) -> bool:
    # A connection breaks because something else ended.
    if isinstance(error, ConnectionError):
        return False
    return isinstance(error, ValueError | OSError | FloatingPointError)


def _mistake_lines(error: BaseException) -> list[str]:
    prefix = "configuration error" if isinstance(error, ConfigError) else "error"
    text = os_error_text(error) if isinstance(error, OSError) else str(error)
    return [f"{prefix}: {line}" for line in text.splitlines() or [type(error).__name__]]


def _memory_text(error: BaseException) -> str:
    """Return what is known about a lack of memory; empty if that is not the error."""
    # By name, as torch may not have been imported.
    if type(error).__name__ == "OutOfMemoryError" or ALLOCATOR in str(error):
        where = "the host" if ALLOCATOR in str(error) else "the GPU"
        known = " ".join(str(error).replace("CUDA out of memory.", "").split())
        return f"out of memory on {where} ({known})"
    if isinstance(error, MemoryError):
        return f"out of memory on the host{f' ({error})' if str(error) else ''}"
    return ""
