"""Processes that tokenize shards: each asks for the next one when it is done with the last.

A worker is a program of its own that reads shards as lines of JSON and answers in lines of JSON, so
that it imports what it needs and no more, and so that nothing of the parent (threads, locks, a
script without a guard) is copied into it.
"""

import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from lcdist.data.prepare.shards import (
    Read,
    Shard,
    ShardJob,
    is_done,
    shard_from,
    to_json,
    tokenize_shard,
    work_from,
)
from lcdist.data.tokenizers.files import TextTokenizer, open_tokenizer
from lcdist.data.tokenizers.huggingface import SpecialTokens

_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from lcdist.data.prepare.workers import serve
serve()
"""
_Answer = tuple[int, str, object]


def tokenize_all(
    work: ShardJob, shards: Sequence[Shard], tokenizer: Path, workers: int, read: Read
) -> None:
    """Write all of `shards` that are not there yet, with `workers` processes (1: this one).

    tokenizer: what `open_tokenizer` opens. read: hears of bytes of text done. Raises ValueError for
    the first document, in the order of the corpus, that is refused, and where a process dies.
    """
    left = []
    for shard in shards:
        if is_done(work, shard):
            read(shard.size)
        else:
            left.append(shard)
    workers = min(workers, len(left))
    if workers <= 1:
        opened = _opened(work, tokenizer)
        for shard in left:
            tokenize_shard(work, shard, opened, read)
        return
    _Pool(work, left, tokenizer).run(workers, read)


def _opened(work: ShardJob, tokenizer: Path) -> TextTokenizer:
    return open_tokenizer(tokenizer, SpecialTokens(add_bos=work.add_bos))


class _Pool:
    """One thread a worker hands it shards and collects what it says."""

    def __init__(self, work: ShardJob, shards: Sequence[Shard], tokenizer: Path) -> None:
        self._work, self._tokenizer = work, tokenizer
        self._left = iter(shards)
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._answers: queue.Queue[_Answer] = queue.Queue()

    def run(self, workers: int, read: Read) -> None:
        refused: dict[int, str] = {}
        with self._started(workers) as processes:
            threads = [threading.Thread(target=self._serve, args=(p,)) for p in processes]
            for thread in threads:
                thread.start()
            try:
                running = len(threads)
                while running:
                    number, word, value = self._answers.get()
                    if word == "read":
                        read(int(str(value)))
                    elif word == "ended":
                        running -= 1
                    else:
                        # Shards are handed out in order: those before this one are under way.
                        self._stopping.set()
                        refused[number] = str(value)
            finally:
                self._stopping.set()
                for process in processes:
                    process.kill()
                for thread in threads:
                    thread.join()
        if refused:
            raise ValueError(refused[min(refused)])

    @contextlib.contextmanager
    def _started(self, workers: int) -> Iterator[list[subprocess.Popen[str]]]:
        words = [sys.executable, "-c", _PROGRAM, json.dumps(sys.path)]
        words += [to_json(self._work), str(self._tokenizer)]
        piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes: list[subprocess.Popen[str]] = []
        try:
            processes += [subprocess.Popen(words, **piped) for _ in range(workers)]
            yield processes
        finally:
            for process in processes:
                process.kill()
                # What was written to a dead process and never read goes nowhere.
                with contextlib.suppress(BrokenPipeError):
                    process.communicate()

    def _next(self) -> Shard | None:
        with self._lock:
            return None if self._stopping.is_set() else next(self._left, None)

    def _serve(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        while (shard := self._next()) is not None:
            try:
                process.stdin.write(to_json(shard) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                self._answers.put((shard.number, "refused", self._death(process)))
                break
            word = ""
            while word not in ("done", "refused"):
                line = process.stdout.readline()
                word, value = json.loads(line) if line else ("refused", self._death(process))
                if word != "done":
                    self._answers.put((shard.number, word, value))
        self._answers.put((-1, "ended", None))

    def _death(self, process: subprocess.Popen[str]) -> str:
        status = process.wait()
        return (
            f"a tokenizing process ended with status {status} (a negative one is a signal; -9 is "
            "often a lack of memory): give fewer --workers; the same command goes on where it was"
        )


def serve() -> None:
    """A worker's whole life: shards in on standard input, answers out, until there are no more."""
    # Ctrl-C reaches the whole terminal; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    work = work_from(sys.argv[2])
    tokenizer = _opened(work, Path(sys.argv[3]))

    def say(word: str, value: object = None) -> None:
        sys.stdout.write(json.dumps([word, value]) + "\n")
        sys.stdout.flush()

    with contextlib.suppress(BrokenPipeError):
        for line in sys.stdin:
            try:
                tokenize_shard(work, shard_from(line), tokenizer, lambda size: say("read", size))
            except ValueError as error:
                say("refused", str(error))
            else:
                say("done")
