"""Run a function on several gloo processes: the harness of every multi-process test.

Processes come from a fork server that has imported torch, Megatron-core (`preload.py`) and the
modules of the tests once, so a launch costs about 0.1 s. Several cases in one function share one
launch.
"""

import multiprocessing as mp
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.unwritten import fill_empty_with_nan

COLLECTIVE_TIMEOUT = timedelta(seconds=60)
STOP_SECONDS = 2.0
FAILURE_SECONDS = 0.5
# Packages that the fork server loads too, where the tests of this process need them: in every rank
# the test's module and what it imports would take seconds.
PRELOADED = ("lcdist", "lcdist_kernels", "peft", "tests", "transformers")


class RankError(Exception):
    """A rank's traceback: the cause of the exception that `run_ranks` raises again."""

    def __str__(self) -> str:
        return "\n" + self.args[0]


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0
) -> list[Any]:
    """Run `fn(rank, world_size, *args)` on `world_size` processes; return results in rank order.

    Args:
        fn: a picklable top-level function. It runs with a gloo default group of `world_size` ranks,
            one torch thread, NaN in every unwritten float tensor, and seed 0.
        args: pickled, as are the results (tensors by value).
        timeout: seconds for the whole call.

    Raises:
        The first failing rank's exception, with that rank's traceback as its cause.
        TimeoutError: time is up.
        RuntimeError: a rank died without a message.

    No process is left running.
    """
    context = mp.get_context("forkserver")
    # Has no effect once the fork server runs.
    context.set_forkserver_preload(["tests.preload", *_loaded_modules()])
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="lcdist-test-") as folder:
        ranks = _start(context, fn, world_size, args, Path(folder) / "store")
        processes = [process for process, _ in ranks]
        try:
            results = _collect(ranks, deadline, timeout)
        except BaseException:
            _kill(processes)
            raise
        for process in processes:
            process.join(STOP_SECONDS)
        _kill(processes)
        return results


def _loaded_modules() -> list[str]:
    """Return the modules that this process has loaded and that a rank would load for most tests."""
    return sorted(name for name in sys.modules if name.partition(".")[0] in PRELOADED)


def _start(
    context: ForkServerContext, fn: Callable[..., Any], world_size: int, args: tuple, store: Path
) -> list[tuple[ForkServerProcess, Connection]]:
    ranks = []
    call = pickle.dumps((fn, args))
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main, args=(rank, world_size, str(store), call, theirs), daemon=False
        )
        process.start()
        theirs.close()
        ranks.append((process, ours))
    return ranks


def _collect(
    ranks: list[tuple[ForkServerProcess, Connection]], deadline: float, timeout: float
) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[tuple[float, BaseException]] = []
    waiting = {pipe: rank for rank, (_, pipe) in enumerate(ranks)}
    while waiting:
        # One rank's failure makes others fail: collect all failures and report the first.
        seconds = FAILURE_SECONDS if failures else max(0.0, deadline - time.monotonic())
        ready = wait(list(waiting), seconds)
        if not ready and not failures:
            raise TimeoutError(f"ranks {sorted(waiting.values())} not done after {timeout:g} s")
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            when, error, answer = _read(rank, *ranks[rank])
            if error is None:
                results[rank] = answer
            else:
                failures.append((when, error))
    if failures:
        raise min(failures, key=lambda failure: failure[0])[1]
    return [results[rank] for rank in range(len(ranks))]


def _read(
    rank: int, process: ForkServerProcess, pipe: Connection
) -> tuple[float, BaseException | None, Any]:
    """Return the time at which the rank ended, its error, and its result.

    A silent death gets time 0: no other failure can be its cause.
    """
    try:
        when, ok, answer = pipe.recv()
    except EOFError:
        process.join(STOP_SECONDS)
        died = f"rank {rank} died without a word, exit code {process.exitcode}"
        return 0.0, RuntimeError(died), None
    if ok:
        return when, None, pickle.loads(answer)
    error, text = pickle.loads(answer)
    error.__cause__ = RankError(text)
    return when, error, None


def _kill(processes: list[ForkServerProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def _rank_main(rank: int, world_size: int, store: str, call: bytes, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fill_empty_with_nan()
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
        fn, args = pickle.loads(call)
        answer = pickle.dumps(fn(rank, world_size, *args))
        # No rank may leave while another may still need it.
        dist.barrier()
        pipe.send((time.monotonic(), True, answer))
    except BaseException as error:
        text = f"rank {rank} of {world_size}:\n{traceback.format_exc()}"
        pipe.send((time.monotonic(), False, _dump_error(error, text)))
    finally:
        pipe.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _dump_error(error: BaseException, text: str) -> bytes:
    try:
        whole = pickle.dumps((error, text))
        pickle.loads(whole)
        return whole
    except Exception:
        return pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), text))
