"""Tokenizing gives the same bytes if it is killed anywhere and run again with any workers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lcdist.data.meta import read_meta
from lcdist.data.prepare import shards as shards_module
from lcdist.data.prepare.chunks import FileChunk
from lcdist.data.prepare.corpus import Source
from lcdist.data.prepare.prepare import Prepared, prepare
from lcdist.data.prepare.settings import TokenizeSettings
from lcdist.data.prepare.workers import tokenize_shards
from tests.data.test_prepare import SETTINGS, change, contents

ROOT = Path(__file__).parents[2]
SHARD = 4000  # as in killed.py


def kill(corpus: Path, out: Path, settings: TokenizeSettings, when: tuple[str, int]) -> None:
    """Run prepare in a process that is killed at the `when[1]`-th progress report of `when[0]`."""
    options = {key: value for key, value in vars(settings).items() if key != "special_tokens"}
    words = [str(corpus), str(out), json.dumps(options), when[0], str(when[1])]
    program = [sys.executable, "-m", "tests.data.killed", *words]
    done = subprocess.run(program, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


def without_meta(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name != "meta.json"}


@pytest.mark.parametrize(
    ("workers", "when"),
    [(1, ("tokenizing", 1)), (1, ("tokenizing", 25)), (2, ("tokenizing", 25)), (1, ("joining", 3))],
)
def test_a_killed_run_continues_to_the_same_bytes(
    corpus: Path,
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    when: tuple[str, int],
) -> None:
    monkeypatch.setattr(shards_module, "SHARD_BYTES", SHARD)
    out = tmp_path / "out"
    kill(corpus, out, change(workers=workers), when)
    (left,) = tmp_path.iterdir()
    assert left != out
    with pytest.raises(ValueError, match="incomplete"):
        read_meta(left)
    complete = {path for path in left.glob("shards/*/??????") if (path / "shard.json").is_file()}
    assert bool(complete) == (when[1] > 1)
    inodes = {path.stat().st_ino for path in complete}
    seen: list[set[int]] = []

    def look(stage: str, _done: int, _total: int) -> None:
        if stage == "joining" and not seen:
            seen.append({path.stat().st_ino for path in left.glob("shards/*/??????")})

    again = prepare(Source(corpus), out, change(workers=3 - workers), progress=look)
    assert again.fresh and os.listdir(tmp_path) == ["out"]
    # Complete shards are not made again, and the result equals that of an uninterrupted run.
    assert inodes <= seen[0]
    assert without_meta(out) == without_meta(prepared.folder)
    assert again.meta.digest == prepared.meta.digest


def interrupted(
    corpus: Path, out: Path, settings: TokenizeSettings, after: int, error: type[BaseException]
) -> None:
    reports: list[str] = []

    def stop(stage: str, _done: int, _total: int) -> None:
        reports.append(stage)
        if reports.count("tokenizing") == after:
            raise error

    with pytest.raises(error):
        prepare(Source(corpus), out, settings, progress=stop)


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_of_an_interrupted_run_are_used_for_the_same_job_only(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(shards_module, "SHARD_BYTES", SHARD)
    out = tmp_path / "out"
    interrupted(corpus, out, change(workers=workers), 25, KeyboardInterrupt)
    (left,) = tmp_path.iterdir()
    kept = [path for path in left.glob("shards/*/*") if path.suffix == ""]
    assert kept
    # With another seed, nothing of the first run may be used.
    made = prepare(Source(corpus), out, change(seed=5))
    fresh = prepare(Source(corpus), tmp_path / "fresh", change(seed=5))
    assert without_meta(made.folder) == without_meta(fresh.folder)
    assert sorted(os.listdir(tmp_path)) == ["fresh", "out"]


def test_a_run_interrupted_at_the_start_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    interrupted(corpus, tmp_path / "out", SETTINGS, 1, KeyboardInterrupt)
    assert os.listdir(tmp_path) == []


def test_a_damaged_shard_is_made_again(
    corpus: Path, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "SHARD_BYTES", SHARD)
    out = tmp_path / "out"
    interrupted(corpus, out, SETTINGS, 25, KeyboardInterrupt)
    (first, *_) = sorted(tmp_path.glob(".out.partial/shards/*/000000"))
    (first / "train.bin").write_bytes((first / "train.bin").read_bytes()[:-2])
    prepare(Source(corpus), out, SETTINGS)
    assert without_meta(out) == without_meta(prepared.folder)


def test_a_complete_folder_that_was_not_renamed_is_renamed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    made = prepare(Source(corpus), out, SETTINGS)
    out.rename(tmp_path / ".out.partial")
    again = prepare(Source(corpus), out, SETTINGS)
    assert again.meta == made.meta and os.listdir(tmp_path) == ["out"]
    # With another seed, nothing of it may be used.
    out.rename(tmp_path / ".out.partial")
    other = prepare(Source(corpus), out, change(seed=3))
    assert other.meta.settings["seed"] == 3 and other.meta.tokens != made.meta.tokens


def bad_lines(folder: Path, lines: int, bad: set[int]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "a.jsonl"
    text = [
        "{broken" if n in bad else f'{{"text": "line {n} of many words, {n * n} of them"}}'
        for n in range(1, lines + 1)
    ]
    path.write_text("\n".join(text) + "\n")
    return path


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_unreadable_line_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(shards_module, "SHARD_BYTES", 600)
    monkeypatch.setattr("lcdist.data.prepare.chunks.CHUNK_BYTES", 300)
    source = Source(bad_lines(tmp_path, 200, {140, 171, 199}))
    first = prepare_bytes(source, tmp_path / "first", change(on_error="skip"))
    assert [(e["line"], e["file"]) for e in first.meta.skipped] == [
        (n, "a.jsonl") for n in (140, 171, 199)
    ]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 140, byte .*on_error = .skip"):
        prepare_bytes(source, tmp_path / "out", change(workers=workers))
    hopeless = Source(bad_lines(tmp_path / "all", 200, set(range(1, 201))))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1, byte"):
        prepare_bytes(hopeless, tmp_path / "none", change(workers=workers))
    # Earlier shards are kept, and a run with "skip" continues from there to the same bytes.
    assert list(tmp_path.glob(".out.partial/shards/*/000000"))
    made = prepare_bytes(source, tmp_path / "out", change(workers=workers, on_error="skip"))
    assert contents(made.folder)["train.bin"] == contents(first.folder)["train.bin"]
    assert made.meta.skipped == first.meta.skipped


def test_documents_skipped_by_an_earlier_run_raise_in_a_run_that_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "SHARD_BYTES", 600)
    monkeypatch.setattr("lcdist.data.prepare.chunks.CHUNK_BYTES", 300)
    source, out = Source(bad_lines(tmp_path, 200, {3})), tmp_path / "out"

    def stop(stage: str, done: int, _total: int) -> None:
        if stage == "tokenizing" and done > 3000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_bytes(source, out, change(on_error="skip"), progress=stop)
    with pytest.raises(ValueError, match="'line': 3"):
        prepare_bytes(source, out, change())


def prepare_bytes(
    source: Source, out: Path, settings: TokenizeSettings, progress: Callable | None = None
) -> Prepared:
    return prepare(
        source,
        out,
        change(**{**vars(settings), "vocab_size": None}),
        "bytes",
        progress=progress,
    )


def test_a_worker_that_dies_raises_without_delay(corpus: Path, tmp_path: Path) -> None:
    job = shards_module.ShardJob(
        str(tmp_path), ("train",), 0.0, 0, False, shards_module.ReadOptions("skip")
    )
    files = sorted(corpus.rglob("*.txt"))[:4]
    chunks = [
        (FileChunk(shards_module.SourceFile(path, path.name, 9), 0, 9, 9), "train")
        for path in files
    ]
    shards = [shards_module.Shard(i, (chunk,)) for i, chunk in enumerate(chunks)]
    start = time.monotonic()
    # There is no such tokenizer: both processes end before they answer.
    with pytest.raises(ValueError, match=r"process ended with status 1 .*--workers"):
        tokenize_shards(job, shards, tmp_path / "nowhere", 2, lambda size: None)
    assert time.monotonic() - start < 60
