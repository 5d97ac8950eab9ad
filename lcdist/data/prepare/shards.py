"""Tokenize a corpus in shards of some chunks each, and merge the shards in order.

A shard is a folder that is renamed to its final name when it is complete. A process can be killed
at any moment, and the shards that it has finished remain. The contents of a shard depend on its
chunks alone, so neither the number of processes nor an interruption changes a byte.
"""

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lcdist.data.prepare.chunks import (
    FileChunk,
    ReadOptions,
    SkipCounts,
    read_documents,
    shift_lines,
)
from lcdist.data.prepare.conversations import ChatTemplate
from lcdist.data.prepare.corpus import OnBytes, SourceFile, hash_fraction, ignore_bytes
from lcdist.data.prepare.indexed import IndexedWriter
from lcdist.data.prepare.readers import Document
from lcdist.data.tokenizers.chat import chat_tokenizer
from lcdist.data.tokenizers.files import TextTokenizer, bos_prefix
from lcdist.utils.errors import naming
from lcdist.utils.json_file import read_object

# Input bytes per shard: a few seconds of work, which a process loses if it is interrupted.
SHARD_BYTES = 8 * 2**20
_RECORD = "shard.json"
_RECORD_TYPES = {"empty": int, "parts": list, "sizes": dict[str, int]}
# A chunk and its split. None: decided by the name of each document.
PlannedChunk = tuple[FileChunk, str | None]


@dataclass(frozen=True)
class ShardJob:
    """Settings that all shards have in common.

    Attributes:
        folder: folder that contains the shards.
        splits: names of the splits.
        valid_fraction, seed: determine the split of a document if its chunk does not.
        add_bos: whether documents begin with bos.
        reading: options for reading documents.
    """

    folder: str
    splits: tuple[str, ...]
    valid_fraction: float
    seed: int
    add_bos: bool
    reading: ReadOptions

    @property
    def has_targets(self) -> bool:
        """Return whether documents say which of their tokens to predict."""
        return self.reading.chat is not None

    def split_of(self, document_name: str) -> str:
        """Return the split of the document with this name."""
        return "valid" if hash_fraction(self.seed, document_name) < self.valid_fraction else "train"


@dataclass(frozen=True)
class Shard:
    """Consecutive chunks of the corpus, each with its split."""

    number: int
    chunks: tuple[PlannedChunk, ...]

    @property
    def size(self) -> int:
        """Number of input bytes."""
        return sum(chunk.size for chunk, _ in self.chunks)

    def folder(self, job: ShardJob) -> Path:
        """Return the path of the complete shard."""
        return Path(job.folder, f"{self.number:06}")


def group_into_shards(chunks: Iterable[PlannedChunk]) -> list[Shard]:
    """Group chunks into shards of at least `SHARD_BYTES`, except for the last one."""
    shards, group, size = list[Shard](), list[PlannedChunk](), 0
    for chunk, split in chunks:
        group.append((chunk, split))
        size += chunk.size
        if size >= SHARD_BYTES:
            shards.append(Shard(len(shards), tuple(group)))
            group, size = [], 0
    return [*shards, Shard(len(shards), tuple(group))] if group else shards


def read_chunk(
    job: ShardJob,
    planned: PlannedChunk,
    skip_counts: SkipCounts,
    on_bytes: OnBytes = ignore_bytes,
) -> Iterator[tuple[str, Document]]:
    """Yield (split, document) for each document of a chunk."""
    chunk, split = planned
    for document in read_documents(chunk, job.reading, skip_counts, on_bytes):
        yield split or job.split_of(document.name), document


def tokenize_shard(
    job: ShardJob, shard: Shard, tokenizer: TextTokenizer, on_bytes: OnBytes
) -> None:
    """Tokenize `shard` into its folder. Raises ValueError at an unreadable document to refuse."""
    name = {"prefix": f"{shard.number:06}.", "suffix": ".partial"}
    partial = Path(tempfile.mkdtemp(dir=job.folder, **name))
    prefix, num_empty, chunk_records = bos_prefix(tokenizer), 0, []
    chat = chat_tokenizer(tokenizer) if job.has_targets else None
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                IndexedWriter(partial / split, tokenizer.vocab_size, job.has_targets)
            )
            for split in job.splits
        }
        for planned in shard.chunks:
            skip_counts = SkipCounts()
            for split, document in read_chunk(job, planned, skip_counts, on_bytes):
                if document.answers is not None:
                    assert chat is not None
                    writers[split].add(*chat.encode(document.text, document.answers))
                elif document.text:
                    tokens = tokenizer.encode(document.text)
                    writers[split].add([*prefix, *tokens, tokenizer.eos_id])
                else:
                    num_empty += 1
            chunk_records.append([planned[0].file.name, skip_counts.lines, skip_counts.skipped])
    sizes = {path.name: path.stat().st_size for path in partial.iterdir()}
    record = {"empty": num_empty, "parts": chunk_records, "sizes": sizes}
    with naming(partial / _RECORD):
        (partial / _RECORD).write_text(json.dumps(record), "utf-8")
    try:
        partial.rename(shard.folder(job))
    except OSError:
        # A worker that outlived its parent may have written the same bytes first.
        shutil.rmtree(partial, ignore_errors=True)
        if not shard_is_complete(job, shard):
            raise


def shard_is_complete(job: ShardJob, shard: Shard) -> bool:
    """Return whether the shard is complete on disk; remove it if it is damaged."""
    folder = shard.folder(job)
    if not folder.is_dir():
        return False
    try:
        sizes = read_object(folder / _RECORD, _RECORD_TYPES)["sizes"]
        if all((folder / name).stat().st_size == size for name, size in sizes.items()):
            return True
    except (OSError, ValueError):
        # Files written shortly before a power failure can be lost or truncated.
        pass
    shutil.rmtree(folder)
    return False


@dataclass(frozen=True)
class ShardTotals:
    """Totals of all shards.

    Attributes:
        documents: number of documents by split.
        tokens: number of tokens by split.
        targets: number of tokens to predict by split; None: all.
        empty: number of empty documents.
        skipped: entries of `SkipCounts.skipped`, with lines counted from the start of each file.
    """

    documents: dict[str, int]
    tokens: dict[str, int]
    targets: dict[str, int] | None
    empty: int
    skipped: list[dict]


def merge_shards(
    job: ShardJob,
    shards: Sequence[Shard],
    folder: Path,
    vocab_size: int,
    on_bytes: OnBytes = ignore_bytes,
) -> ShardTotals:
    """Concatenate all shards in order into one pair of files for each split.

    Args:
        job: settings of the shards.
        shards: complete shards.
        folder: destination.
        vocab_size: vocabulary size of the tokenizer.
        on_bytes: called with the input bytes of each merged shard.
    """
    num_empty, skipped, lines_before = 0, list[dict](), dict[str, int]()
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(IndexedWriter(folder / split, vocab_size, job.has_targets))
            for split in job.splits
        }
        for shard in shards:
            shard_folder = shard.folder(job)
            for split, writer in writers.items():
                writer.add_all(shard_folder / split)
            record = read_object(shard_folder / _RECORD, _RECORD_TYPES)
            num_empty += record["empty"]
            for file, num_lines, entries in record["parts"]:
                skipped += shift_lines(entries, lines_before.get(file, 0))
                lines_before[file] = lines_before.get(file, 0) + num_lines
            on_bytes(shard.size)
    return ShardTotals(
        documents={split: writer.documents for split, writer in writers.items()},
        tokens={split: writer.tokens for split, writer in writers.items()},
        targets={split: writer.targets for split, writer in writers.items()}
        if job.has_targets
        else None,
        empty=num_empty,
        skipped=skipped,
    )


def to_json(value: ShardJob | Shard) -> str:
    """Return one line of JSON for a worker process."""
    table = dataclasses.asdict(value)
    return json.dumps(table, default=str)


def job_from_json(text: str) -> ShardJob:
    """Inverse of `to_json` for a `ShardJob`."""
    table = json.loads(text)
    reading = table.pop("reading")
    chat = reading.pop("chat")
    reading = ReadOptions(**reading, chat=chat and ChatTemplate(**chat))
    return ShardJob(**table | {"reading": reading, "splits": tuple(table["splits"])})


def shard_from_json(text: str) -> Shard:
    """Inverse of `to_json` for a `Shard`."""
    table = json.loads(text)
    chunks = []
    for chunk, split in table["chunks"]:
        file = chunk.pop("file")
        source_file = SourceFile(**file | {"path": Path(file["path"])})
        chunks.append((FileChunk(source_file, **chunk), split))
    return Shard(table["number"], tuple(chunks))
