"""`launch/run.py`: what the first rank that failed has to say is printed once and last.

The launcher runs in this process, its ranks in their own.
"""

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lcdist.commands import endings, launcher
from lcdist.commands.endings import Report, end_with, report_of
from lcdist.commands.launcher import first_cause, how_it_ended
from lcdist.commands.main import main
from lcdist.utils.errors import RankError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/debug/full.toml"
# A rank of a program that runs a command of lcdist with another body.
PROGRAM = """
import os, sys, time
from lcdist.commands import run_folder
from lcdist.commands.main import main

rank = int(os.environ["RANK"])

def run(arguments):
{body}

run_folder.run = run
sys.exit(main(["run-folder", "1", "2", "{config}", *sys.argv[1:]]))
"""
Launch = Callable[..., tuple[int, str]]


@pytest.fixture
def launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Launch]:
    """Return a function that runs a body on two ranks: exit status and standard error."""
    before = dict(os.environ)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in numbers}

    def start(body: str, *words: str) -> tuple[int, str]:
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        program = tmp_path / "program.py"
        program.write_text(PROGRAM.format(body=lines, config=CONFIG))
        capfd.readouterr()
        status = launcher.main(["--standalone", "--nproc-per-node=2", str(program), *words])
        return status, capfd.readouterr().err

    monkeypatch.delenv("LOGLEVEL", raising=False)
    yield start
    logging.disable(logging.NOTSET)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


WAIT = "if rank == 0:\n    time.sleep(60)\n"


def test_a_mistake_is_printed_once_and_its_exit_status_is_the_launchers(launch: Launch) -> None:
    status, printed = launch("raise ValueError('no good')")
    assert (status, printed) == (2, "error: no good\n")
    # Found before the command runs, by each rank's parser.
    status, printed = launch("return 0", "--wrong")
    assert (
        status == 2
        and printed == "error: unrecognized arguments: --wrong; see 'lcdist run-folder --help'\n"
    )


def test_a_crash_keeps_its_traceback_once_and_names_the_rank(launch: Launch) -> None:
    status, printed = launch(f"{WAIT}raise KeyError('boom')")
    lines = printed.splitlines()
    assert status == 1 and lines[0] == "rank 1 crashed:" and lines[-1] == "KeyError: 'boom'"
    assert printed.count("Traceback") == 1 and "elastic" not in printed


def test_a_rank_that_was_killed_is_named_with_the_signal(launch: Launch) -> None:
    status, printed = launch(f"{WAIT}os.kill(os.getpid(), 9)")
    assert status == 128 + 9
    assert printed.startswith("error: rank 1 (process ") and "ended by SIGKILL" in printed
    assert printed.count("\n") == 1 and "the same command again" in printed


def test_status_of_another_program_is_passed_on(launch: Launch) -> None:
    assert launch(f"{WAIT}os._exit(70)") == (70, "")
    assert launch("return 0") == (0, "")


def report(rank: int, text: str, seconds: float, alike: bool = False, status: int = 2) -> Report:
    return Report(rank, status, [text] if text else [], alike, seconds)


def test_the_first_cause_is_found() -> None:
    own, later = report(3, "a", 2.0), report(1, "b", 3.0)
    assert first_cause([later, own], 4) == own
    # What several ranks find is rank 0's to tell.
    same = [report(0, "a", 5.0), own]
    assert first_cause(same, 4) == same[0] and same[0].shown() == ["a"]
    assert own.shown() == ["rank 3: a"]
    # What all find is told by the launcher of the first ranks, whichever was ended before it told.
    alike = report(1, "a", 1.0, alike=True)
    assert first_cause([alike], 2) == alike and alike.shown() == ["a"]
    assert first_cause([report(2, "a", 1.0, alike=True)], 2) is None
    assert first_cause([report(0, "interrupted", 1.0, True, endings.INTERRUPTED)], 2) is None


def test_ctrl_c_while_a_run_starts_is_no_crash() -> None:
    """One rank is interrupted, and another loses its connection to it."""
    lost = report(1, "RuntimeError: Connection closed by peer", 2.0, status=endings.CRASH)
    stopped = report(0, "interrupted", 1.0, True, endings.INTERRUPTED)
    assert how_it_ended(0, {}, [stopped, lost], 2) == (130, [])
    assert how_it_ended(130, {}, [lost], 2) == (130, [])
    assert how_it_ended(0, {}, [lost], 2) == (1, lost.lines)


def test_a_rank_hands_its_report_over_or_prints_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {"RANK": "1", "LOCAL_RANK": "1", endings.REPORTS: str(tmp_path)}
    assert end_with(RankError("disk"), environment, False) == 2
    assert capsys.readouterr().err == ""
    (found,) = endings.read_reports(tmp_path)
    assert found.lines == ["error: disk"] and not found.alike and not found.is_on_console
    # With logs of its own it also prints there; the first rank's log is shown on the console.
    logged = environment | {"RANK": "0", "LOCAL_RANK": "0", endings.RANK_LOGS: "logs"}
    assert end_with(RankError("disk"), logged, False) == 2
    assert capsys.readouterr().err == "error: disk\n"
    assert endings.read_reports(tmp_path)[0].is_on_console
    # Under torchrun itself the other ranks leave rank 0 the time to print.
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    bare = {"RANK": "1", "TORCHELASTIC_RUN_ID": "x"}
    assert end_with(ValueError("all find it"), bare, False) == 2
    assert waited == [endings.PATIENCE] and capsys.readouterr().err == ""
    assert end_with(ValueError("all find it"), bare | {"RANK": "0"}, False) == 2
    assert capsys.readouterr().err == "error: all find it\n"


def test_debug_brings_the_traceback_and_the_message_stays_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words in (["--debug", "status", "nowhere"], ["status", "nowhere", "--debug"]):
        assert main(words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("Traceback") and lines[-1].startswith("error: nowhere")
    assert main(["status", "nowhere"]) == 2
    assert "Traceback" not in capsys.readouterr().err


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


ALLOCATOR = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0"), "2 GiB. GPU 0"),
        (RuntimeError(ALLOCATOR), "tried to allocate 9 bytes"),
        (MemoryError(), "on the host; set"),
    ],
)
def test_a_lack_of_memory_says_what_to_change(error: Exception, known: str) -> None:
    found = report_of(error, 3)
    assert found is not None and found.status == 2
    (line,) = found.shown()
    assert line.startswith("rank 3: error: out of memory on") and known in line
    for word in ("train.recompute", "train.micro_batch_size", "train.seqlen", "parallel.cp_size"):
        assert word in line


def test_make_gets_its_own_words() -> None:
    found = report_of(ValueError("--lora -1: must be 0 or more; choose another --name"), 0, "make")
    assert found is not None
    assert found.lines == ["error: LORA=-1: must be 0 or more; choose another NAME="]
    held = report_of(ValueError("choose another --name, or remove the folder"), 0, "make")
    assert held is not None and held.lines == ["error: choose another NAME=, or remove the folder"]
    method = report_of(endings.ConfigError(["attention.method = 'x': must be"]), 0, "make")
    assert method is not None and method.lines[0].endswith("(with make: METHOD=...)")
    config = report_of(endings.ConfigError(["unknown key 'x.y'"]), 0, "make")
    assert config is not None and config.lines[0].endswith('(with make: WITH="section.key=value")')


def test_sbatch_gets_its_own_words() -> None:
    text = "start 2 processes or a multiple (launch/run.py --nproc-per-node)"
    found = report_of(endings.ConfigError([text]), 0, "sbatch")
    assert found is not None and found.lines[0].endswith("(sbatch --nodes and --gpus-per-node)")


def test_a_crash_of_a_single_process_is_pythons_to_tell() -> None:
    with pytest.raises(KeyError):
        end_with(KeyError("boom"), {}, False)
    # A connection that breaks is no mistake of the user.
    with pytest.raises(ConnectionResetError):
        end_with(ConnectionResetError(104, "reset"), {}, False)


def test_reports_are_read_back(tmp_path: Path) -> None:
    written = report(7, "text", 1.5)
    (tmp_path / "7.json").write_text(json.dumps(vars(written)))
    assert endings.read_reports(tmp_path) == [written]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "the program is missing: python launch/run.py [options] PROGRAM [its arguments]; see"),
        ("--nproc-per-node 2 launch/nothing.py", "launch/nothing.py: there is no such program; "),
        ("--nproc-per-node 2 -m no_such.module", "-m no_such.module: there is no such module"),
        ("--nproc-per-node 0 launch/train.py", "--nproc-per-node 0: must be a number of processes"),
        ("--nproc-per-node two launch/train.py", "--nproc-per-node two: must be a number of pro"),
        ("--nproc-per-node -1 launch/train.py", "--nproc-per-node -1: must be a number of proces"),
        ("--nproc-per-node gpu launch/train.py", "--nproc-per-node gpu: Cuda is not available."),
        ("--nnodes 0 launch/train.py", "--nnodes 0: must be a number of nodes, 1 or more, or MIN:"),
        ("--nnodes 3:2 launch/train.py", "--nnodes 3:2: must be a number of nodes, 1 or more, or "),
        ("--nnodes 2 --node-rank 2 launch/train.py", "--node-rank 2: must be from 0 to 1, as --n"),
        ("--master-port 99999 launch/train.py", "--master-port 99999: must be from 0 to 65535"),
        ("--rdzv-backend other launch/train.py", "The rendezvous backend 'other' is not register"),
        ("--log-dir /proc/logs launch/train.py", "/proc/logs: No such file or directory"),
        ("--wrong launch/train.py", "unrecognized arguments: --wrong; see 'python launch/run.py"),
    ],
)
def test_a_mistake_in_the_launchers_arguments_is_one_line(
    words: str,
    told: str,
    launch: Launch,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.is_available() and "gpu" in words:
        pytest.skip("there is a GPU")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert launcher.main(words.split()) == 2
    printed = capfd.readouterr().err
    assert printed.startswith(f"error: {told}") and printed.count("\n") == 1
