"""Start the processes of a program with torch's elastic launcher, and end as its ranks did.

It takes torchrun's arguments. Where torchrun ends with a traceback of its own and a report of forty
lines, this prints what the first rank that failed has to say, once and last. The launcher runs in
this process: it has to receive the signals that a scheduler or a terminal sends.
"""

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

from lcdist.commands.endings import (
    INTERRUPTED,
    REPORTS,
    USER_ERROR,
    Report,
    read_reports,
)
from lcdist.commands.launch_arguments import parse_launch
from lcdist.utils.errors import os_error_text

# Ranks save a checkpoint before they end; torch's launcher would kill them after 30 s.
SHUTDOWN_SECONDS = "600"
TOLD = "Ctrl-C: a run that trains saves after this step and ends; Ctrl-C again ends it at once"
# What an error says if another rank has gone.
LOST_PEER = ("Connection closed", "Connection reset", "Broken pipe", "NCCL", "Socket", "recvValue")


def main(words: Sequence[str] | None = None) -> int:
    """Run a program on several processes.

    Returns:
        0 if all ranks end well, else the exit status of the rank that failed first: 128 and the
        number of a signal if one ended it, or if one ended this launcher.
    """
    try:
        return _launch(sys.argv[1:] if words is None else words)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        # Ranks have processes of their own: this is about arguments, addresses and folders.
        text = os_error_text(error) if isinstance(error, OSError) else " ".join(str(error).split())
        print(f"error: {text}", file=sys.stderr)
        return USER_ERROR


def _launch(words: Sequence[str]) -> int:
    # Not at the top: importing torch takes seconds, in which a user may press Ctrl-C.
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    if "LOGLEVEL" not in os.environ:
        # The launcher tells in its log what is printed here.
        logging.disable(logging.ERROR)
    arguments = parse_launch(run.get_args_parser(), words)
    try:
        ranks = run.determine_local_world_size(arguments.nproc_per_node)
    except ValueError as error:
        raise ValueError(f"--nproc-per-node {arguments.nproc_per_node}: {error}") from error
    _set_up_environment(ranks)
    handled = [name for name in arguments.signals_to_handle.split(",") if name != "SIGINT"]
    arguments.signals_to_handle = ",".join(handled)
    _forward_ctrl_c(SignalException)
    with tempfile.TemporaryDirectory(prefix="lcdist-") as folder:
        os.environ[REPORTS] = folder
        status, failures = 0, {}
        try:
            run.run(arguments)
        except ChildFailedError as error:
            failures = error.failures
        except SignalException as error:
            status = 128 + error.sigval
        except RendezvousError as error:
            raise ValueError(f"the nodes did not find each other: {error}") from error
        reports = read_reports(Path(folder))
    status, lines = how_it_ended(status, failures, reports, ranks)
    for line in lines:
        print(line, file=sys.stderr, flush=True)
    return status


def _set_up_environment(ranks: int) -> None:
    """Set what the ranks inherit, unless it is set."""
    # The processes share the cores of the machine.
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS)


def _forward_ctrl_c(forward: Any) -> None:
    """Let the first SIGINT raise `forward`, which makes torch pass it on; the second kills all.

    The ranks are no members of the terminal's group of processes.
    """

    def at_once(number: int, frame: FrameType | None) -> NoReturn:
        for rank in psutil.Process().children(recursive=True):
            rank.kill()
        print("ended at once", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    def first(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGINT, at_once)
        print(TOLD, file=sys.stderr, flush=True)
        raise forward("Ctrl-C", sigval=signal.SIGINT)

    signal.signal(signal.SIGINT, first)


def how_it_ended(
    status: int, failures: Mapping[int, Any], reports: Sequence[Report], ranks: int
) -> tuple[int, list[str]]:
    """Return the exit status and what is to be printed of the first cause of a failure.

    Args:
        status: 0, or that of a signal that ended the launcher.
        failures: torch's records of failed processes, by rank.
        reports: what the ranks have to say.
        ranks: number of ranks on this machine.
    """
    killed = {rank: -one.exitcode for rank, one in failures.items() if one.exitcode < 0}
    # A rank that waits for one that failed is ended by SIGTERM.
    killed = {rank: number for rank, number in killed.items() if number != signal.SIGTERM}
    report = first_cause(reports, ranks)
    if report is not None and _lost_a_peer(report):
        if status or any(one.status == INTERRUPTED for one in reports):
            # Ctrl-C ended the peer before the first step.
            return status or INTERRUPTED, []
        report = None if killed else report
    if report is not None:
        return report.status, [] if report.is_on_console else report.shown()
    if killed:
        rank = min(killed)
        return 128 + killed[rank], [_killed_text(rank, killed[rank], failures[rank].pid)]
    own = [one for one in failures.values() if one.exitcode > 0]
    return min(own, key=lambda one: one.timestamp).exitcode if own else status, []


def first_cause(reports: Sequence[Report], ranks: int) -> Report | None:
    """Return the report of what went wrong first; None if no rank of this machine reports it.

    Args:
        reports: of this machine's ranks.
        ranks: number of ranks on this machine. What all ranks find is reported on the first.
    """
    own = [one for one in reports if one.lines and one.status != INTERRUPTED]
    own = [one for one in own if not one.alike or one.rank < ranks]
    if not own:
        return None
    first = min(own, key=lambda one: one.time)
    same = [one for one in own if one.lines == first.lines]
    return min(same, key=lambda one: one.rank)


def _lost_a_peer(report: Report) -> bool:
    return report.is_crash and any(word in report.lines[-1] for word in LOST_PEER)


def _killed_text(rank: int, number: int, process: int) -> str:
    name = signal.Signals(number).name
    reason = " (by hand, or because the machine has no memory left)" if number == 9 else ""
    return (
        f"error: rank {rank} (process {process} on {socket.gethostname()}) was ended by {name}"
        f"{reason}; run the same command again to continue from the last checkpoint"
    )
