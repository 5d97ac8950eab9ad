"""Kill runs with SIGKILL at random moments, start them again, and compare their end."""

import random
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lcdist.rundir.status import read_status
from tests.chaos.tally import Tally
from tests.chaos.tiny_run import Start, difference, write_data, write_settings

MEANING = (
    "the run, started again until it ends, has the tensors and losses of an undisturbed run bit "
    "for bit, and nothing half written"
)
MOST_KILLS = 12
# A kill within a later start-up counts as one among steps.
MOMENTS = ("before the first step", "among steps", "within a save")


@dataclass(frozen=True)
class Way:
    """Describe how a run trains: its ranks, and whether saves are asynchronous."""

    ranks: int
    asynchronous: bool

    @property
    def kind(self) -> str:
        """Return the name in the table."""
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"SIGKILL, {ranks}, {'asynchronous' if self.asynchronous else 'synchronous'} saves"

    @property
    def words(self) -> list[str]:
        """Return overrides of the configuration."""
        asynchronous = str(self.asynchronous).lower()
        return [f"parallel.cp_size={self.ranks}", f"checkpoint.asynchronous={asynchronous}"]


WAYS = tuple(Way(ranks, asynchronous) for ranks in (1, 2) for asynchronous in (False, True))


def try_kills(
    folder: Path,
    kills: int,
    drawn: tuple[float, random.Random],
    ways: Sequence[Way] = WAYS,
    most: int = MOST_KILLS,
) -> list[Tally]:
    """Kill runs of every way until each way has its share of `kills` kills.

    Args:
        folder: empty; for runs and data.
        kills: to do in all; a run that was killed is brought to its end.
        drawn: mean seconds from a start to its kill, which are drawn from an exponential
            distribution, and what draws them.
        ways: to train.
        most: starts of one run that may be killed; the next one is left alone, so that it ends.

    Returns:
        One tally for each way.
    """
    data, tallies = write_data(folder / "source"), []
    for way in ways:
        undisturbed, moments, runs = _undisturbed(folder, data, way), Counter(), 0
        tally = Tally(way.kind, MEANING)
        while tally.tried < kills / len(ways):
            run, runs = folder / f"run{runs}-{way.ranks}-{way.asynchronous}", runs + 1
            count, problem = _kill_until_done(run, data, way, drawn, most, moments)
            problem = problem or difference(run, undisturbed)
            tally.add(problem and f"{run.name} after {count} kills: {problem}", count)
            if problem is None:
                shutil.rmtree(run)
        told = ", ".join(f"{moments[moment]} {moment}" for moment in MOMENTS)
        tally.kind += f" ({runs} runs; {told})"
        tallies.append(tally)
    return tallies


def _undisturbed(folder: Path, data: Path, way: Way) -> Path:
    run = folder / f"undisturbed-{way.ranks}-{way.asynchronous}"
    start = _start(run, data, way)
    status = start.end()
    assert status == 0, start.printed.read_text()
    return run


def _start(run: Path, data: Path, way: Way) -> Start:
    settings = write_settings(run.parent / f"{run.name}.toml", data, run)
    printed = run.parent / f"{run.name}.log"
    return Start(["train", str(settings), *way.words], printed, way.ranks)


def _kill_until_done(
    run: Path, data: Path, way: Way, drawn: tuple[float, random.Random], most: int, moments: Counter
) -> tuple[int, str | None]:
    """Start the run until it ends; return the number of kills and what went wrong."""
    kills, (mean_seconds, chance) = 0, drawn
    while True:
        start = _start(run, data, way)
        left_alone = kills >= most or start.wait(chance.expovariate(1 / mean_seconds))
        if not left_alone:
            kills += 1
            # A machine fails with all its ranks, or one process and then, soon, the others.
            if way.ranks > 1 and chance.random() < 0.5:
                start.kill(chance.randrange(way.ranks))
                start.wait(chance.random() * 0.2)
            start.kill()
            moments[_moment(run)] += 1
        status = start.end()
        if left_alone:
            tail = " ".join(start.printed.read_text().split())[-300:]
            return kills, None if status == 0 else f"exit status {status}: {tail}"


def _moment(run: Path) -> str:
    """Return what a run did when it was killed, as far as its folder tells."""
    if any((run / "checkpoints").glob(".writing-*")):
        return MOMENTS[2]
    status = read_status(run)
    return MOMENTS[0] if status is None or status["status"] != "running" else MOMENTS[1]
