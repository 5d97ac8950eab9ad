"""Shards of a corpus: some parts each, tokenized apart from all others, joined in their order.

A shard is a folder that gets its name when it is whole, so a process may be killed at any moment
and what it had finished stays. What a shard holds depends on its parts alone, so neither the number
of processes nor an interruption changes a byte.
"""

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lcdist.data.prepare.chunks import (
    Document,
    FileChunk,
    ReadOptions,
    SkipCounts,
    documents,
    number_lines,
)
from lcdist.data.prepare.corpus import SourceFile, share
from lcdist.data.prepare.indexed import IndexedWriter
from lcdist.data.tokenizers.files import TextTokenizer, bos_prefix

# Bytes of input: a few seconds of work, which is what an interruption costs a process.
SHARD_BYTES = 8 * 2**20
_RECORD = "shard.json"
# Bytes of text read so far, told while it is read.
Read = Callable[[int], None]


@dataclass(frozen=True)
class ShardJob:
    """What every shard is made with.

    folder: where shards go. splits: names of the splits there are. valid_fraction, seed: decide the
    split of a document that its part does not decide. add_bos: whether documents begin with bos.
    """

    folder: str
    splits: tuple[str, ...]
    valid_fraction: float
    seed: int
    add_bos: bool
    reading: ReadOptions

    def split(self, name: str) -> str:
        """The split of the document of that name."""
        return "valid" if share(self.seed, name) < self.valid_fraction else "train"


@dataclass(frozen=True)
class Shard:
    """Consecutive parts, each with its split (None: decided by document)."""

    number: int
    parts: tuple[tuple[FileChunk, str | None], ...]

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(part.size for part, _ in self.parts)

    def folder(self, work: ShardJob) -> Path:
        """Where it lies when it is whole."""
        return Path(work.folder, f"{self.number:06}")


def shards_of(parts: Iterable[tuple[FileChunk, str | None]]) -> list[Shard]:
    """Parts to shards of at least `SHARD_BYTES`, but for the last."""
    shards, held, size = list[Shard](), list[tuple[FileChunk, str | None]](), 0
    for part, split in parts:
        held.append((part, split))
        size += part.size
        if size >= SHARD_BYTES:
            shards.append(Shard(len(shards), tuple(held)))
            held, size = [], 0
    return [*shards, Shard(len(shards), tuple(held))] if held else shards


def drawn_documents(
    work: ShardJob,
    part: FileChunk,
    split: str | None,
    tally: SkipCounts,
    read: Read = lambda size: None,
) -> Iterator[tuple[str, Document]]:
    """The documents of a part, each with its split."""
    for document in documents(part, work.reading, tally, read):
        yield split or work.split(document.name), document


def tokenize_shard(work: ShardJob, shard: Shard, tokenizer: TextTokenizer, read: Read) -> None:
    """Write `shard` under its name. Raises ValueError where a document is refused."""
    name = {"prefix": f"{shard.number:06}.", "suffix": ".partial"}
    partial = Path(tempfile.mkdtemp(dir=work.folder, **name))
    first, empty, parts = bos_prefix(tokenizer), 0, []
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(IndexedWriter(partial / name, tokenizer.vocab_size))
            for name in work.splits
        }
        for part, split in shard.parts:
            tally = SkipCounts()
            for drawn, document in drawn_documents(work, part, split, tally, read):
                if document.text:
                    tokens = tokenizer.encode(document.text)
                    writers[drawn].add([*first, *tokens, tokenizer.eos_id])
                else:
                    empty += 1
            parts.append([part.file.name, tally.lines, tally.skipped])
    sizes = {path.name: path.stat().st_size for path in partial.iterdir()}
    record = {"empty": empty, "parts": parts, "sizes": sizes}
    (partial / _RECORD).write_text(json.dumps(record), "utf-8")
    try:
        partial.rename(shard.folder(work))
    except OSError:
        # A process that outlived its parent may have been first, with the same bytes.
        shutil.rmtree(partial, ignore_errors=True)
        if not is_done(work, shard):
            raise


def is_done(work: ShardJob, shard: Shard) -> bool:
    """Whether the shard lies there whole; one that is damaged is taken away."""
    folder = shard.folder(work)
    if not folder.is_dir():
        return False
    try:
        sizes = json.loads((folder / _RECORD).read_text("utf-8"))["sizes"]
        if all((folder / name).stat().st_size == size for name, size in sizes.items()):
            return True
    except (OSError, ValueError):
        # Written before a power cut, and lost in it.
        pass
    shutil.rmtree(folder)
    return False


@dataclass(frozen=True)
class ShardTotals:
    """Totals of all shards: documents and tokens by split, empty documents, what was skipped."""

    documents: dict[str, int]
    tokens: dict[str, int]
    empty: int
    skipped: list[dict]


def join(
    work: ShardJob,
    shards: Sequence[Shard],
    folder: Path,
    vocab_size: int,
    joined: Read = lambda size: None,
) -> ShardTotals:
    """All shards, in order, as one pair of files a split in `folder`; `joined` hears of bytes."""
    empty, skipped, lines = 0, list[dict](), dict[str, int]()
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(IndexedWriter(folder / name, vocab_size))
            for name in work.splits
        }
        for shard in shards:
            place = shard.folder(work)
            for name, writer in writers.items():
                writer.add_all(place / name)
            record = json.loads((place / _RECORD).read_text("utf-8"))
            empty += record["empty"]
            for file, count, bad in record["parts"]:
                skipped += number_lines(bad, lines.get(file, 0))
                lines[file] = lines.get(file, 0) + count
            joined(shard.size)
    return ShardTotals(
        documents={name: writer.documents for name, writer in writers.items()},
        tokens={name: writer.tokens for name, writer in writers.items()},
        empty=empty,
        skipped=skipped,
    )


def to_json(value: ShardJob | Shard) -> str:
    """One line that a worker process reads."""
    table = dataclasses.asdict(value)
    return json.dumps(table, default=str)


def work_from(text: str) -> ShardJob:
    """What `to_json` wrote of a `ShardJob`."""
    table = json.loads(text)
    reading = ReadOptions(**table.pop("reading"))
    return ShardJob(**table | {"reading": reading, "splits": tuple(table["splits"])})


def shard_from(text: str) -> Shard:
    """What `to_json` wrote of a `Shard`."""
    table = json.loads(text)
    parts = []
    for part, split in table["parts"]:
        file = part.pop("file")
        parts.append(
            (FileChunk(SourceFile(Path(file["path"]), file["name"], file["size"]), **part), split)
        )
    return Shard(table["number"], tuple(parts))
