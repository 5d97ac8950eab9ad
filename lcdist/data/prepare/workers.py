"""Tokenize shards with several worker processes; each gets its next shard when it is idle.

A worker is a separate program that reads shards as lines of JSON and answers in lines of JSON. It
imports only what it needs, and inherits nothing from the parent: no threads, no locks, and no main
script that lacks a guard.
"""

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from lcdist.data.prepare.corpus import OnBytes
from lcdist.data.prepare.shards import (
    Shard,
    ShardJob,
    job_from_json,
    shard_from_json,
    shard_is_complete,
    to_json,
    tokenize_shard,
)
from lcdist.data.tokenizers.files import TextTokenizer, open_tokenizer
from lcdist.data.tokenizers.huggingface import SpecialTokens
from lcdist.utils.errors import os_error_text

_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from lcdist.data.prepare.workers import work
work()
"""
# Shard number, kind ("read", "refused" or "ended") and value.
_Event = tuple[int, str, object]


def tokenize_shards(
    job: ShardJob, shards: Sequence[Shard], tokenizer: Path, workers: int, on_bytes: OnBytes
) -> None:
    """Tokenize all of `shards` that are not complete yet.

    Args:
        job: settings of the shards.
        shards: all shards in the order of the corpus.
        tokenizer: path for `open_tokenizer`.
        workers: number of processes; 1 uses this process.
        on_bytes: called with the number of input bytes after each read.

    Raises:
        ValueError: for the first document, in the order of the corpus, that is refused; or a worker
            process has died.
    """
    pending = []
    for shard in shards:
        if shard_is_complete(job, shard):
            on_bytes(shard.size)
        else:
            pending.append(shard)
    workers = min(workers, len(pending))
    if workers <= 1:
        opened = _open_tokenizer(job, tokenizer)
        for shard in pending:
            tokenize_shard(job, shard, opened, on_bytes)
        return
    _WorkerPool(job, pending, tokenizer).run(workers, on_bytes)


def _open_tokenizer(job: ShardJob, tokenizer: Path) -> TextTokenizer:
    return open_tokenizer(tokenizer, SpecialTokens(add_bos=job.add_bos))


class _WorkerPool:
    """Worker processes with one thread each, which sends shards and collects the answers."""

    def __init__(self, job: ShardJob, shards: Sequence[Shard], tokenizer: Path) -> None:
        self._job, self._tokenizer = job, tokenizer
        self._pending = iter(shards)
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._events: queue.Queue[_Event] = queue.Queue()

    def run(self, workers: int, on_bytes: OnBytes) -> None:
        """Tokenize all shards. Raises ValueError as `tokenize_shards`."""
        errors: dict[int, str] = {}
        with self._started(workers) as processes:
            threads = [threading.Thread(target=self._serve, args=(p,)) for p in processes]
            for thread in threads:
                thread.start()
            try:
                running = len(threads)
                while running:
                    number, kind, value = self._events.get()
                    if kind == "read":
                        on_bytes(int(str(value)))
                    elif kind == "ended":
                        running -= 1
                    else:
                        # Shards are sent in order, so all earlier ones are running or complete.
                        self._stopping.set()
                        errors[number] = str(value)
            finally:
                self._stopping.set()
                for process in processes:
                    process.kill()
                for thread in threads:
                    thread.join()
        if errors:
            raise ValueError(errors[min(errors)])

    @contextlib.contextmanager
    def _started(self, workers: int) -> Iterator[list[subprocess.Popen[str]]]:
        command = [sys.executable, "-c", _PROGRAM, json.dumps(sys.path)]
        command += [to_json(self._job), str(self._tokenizer)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes: list[subprocess.Popen[str]] = []
        try:
            # In a process group of their own, which a terminal's Ctrl-C does not reach.
            options = {**pipes, "process_group": 0}
            processes += [subprocess.Popen(command, **options) for _ in range(workers)]
            yield processes
        finally:
            for process in processes:
                process.kill()
                # Data written to a dead process and never read is dropped.
                with contextlib.suppress(BrokenPipeError):
                    process.communicate()

    def _next_shard(self) -> Shard | None:
        with self._lock:
            return None if self._stopping.is_set() else next(self._pending, None)

    def _serve(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        while (shard := self._next_shard()) is not None:
            try:
                process.stdin.write(to_json(shard) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                self._events.put((shard.number, "refused", self._death_message(process)))
                break
            kind = ""
            while kind not in ("done", "refused"):
                line = process.stdout.readline()
                if line:
                    kind, value = json.loads(line)
                else:
                    kind, value = "refused", self._death_message(process)
                if kind != "done":
                    self._events.put((shard.number, kind, value))
        self._events.put((-1, "ended", None))

    def _death_message(self, process: subprocess.Popen[str]) -> str:
        status = process.wait()
        return (
            f"a tokenizing process ended with status {status} (a negative status is a signal; -9 "
            "often means a lack of memory): use fewer --workers; run the same command again to "
            "continue"
        )


def work() -> None:
    """Run a worker: read shards from standard input and write answers until the input ends."""
    job = job_from_json(sys.argv[2])
    tokenizer = _open_tokenizer(job, Path(sys.argv[3]))

    def answer(kind: str, value: object = None) -> None:
        sys.stdout.write(json.dumps([kind, value]) + "\n")
        sys.stdout.flush()

    def report_bytes(size: int) -> None:
        answer("read", size)

    with contextlib.suppress(BrokenPipeError):
        for line in sys.stdin:
            try:
                tokenize_shard(job, shard_from_json(line), tokenizer, report_bytes)
            except OSError as error:
                answer("refused", os_error_text(error))
            except ValueError as error:
                answer("refused", str(error))
            else:
                answer("done")
