"""Tokenize text into a token folder: tokenizer, train and valid split in Megatron's format.

The folder is built beside its final path and renamed when it is complete, so a folder with that
name is always complete. The result depends on texts, names and settings alone, not on the machine
or the number of processes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lcdist.data.meta import FORMAT, META, Meta, read_meta, write_meta
from lcdist.data.prepare.chunks import CHUNK_BYTES, FileChunk, ReadOptions, SkipCounts, split_file
from lcdist.data.prepare.conversations import check_files
from lcdist.data.prepare.corpus import (
    OnBytes,
    Source,
    SourceFile,
    digest_files,
    hash_fraction,
    scan_source,
)
from lcdist.data.prepare.folder_build import FolderBuild, folder_build, is_complete
from lcdist.data.prepare.indexed import document_lengths
from lcdist.data.prepare.retention import retention
from lcdist.data.prepare.settings import TokenizeSettings, check_settings
from lcdist.data.prepare.shards import (
    SHARD_BYTES,
    PlannedChunk,
    ShardJob,
    group_into_shards,
    merge_shards,
    read_chunk,
)
from lcdist.data.prepare.workers import tokenize_shards
from lcdist.data.tokenizers.chat import TEMPLATE_FILE
from lcdist.data.tokenizers.files import TextTokenizer, open_tokenizer
from lcdist.data.tokenizers.sentencepiece_bpe import MODEL_FILE, train_tokenizer
from lcdist.utils.progress import Progress


@dataclass(frozen=True)
class Prepared:
    """A complete token folder.

    Attributes:
        folder: its path.
        meta: its meta.json, with the account of the present source.
        fresh: False if the folder existed before.
    """

    folder: Path
    meta: Meta
    fresh: bool


def prepare(
    source: Source,
    out_folder: str | Path,
    settings: TokenizeSettings,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Tokenize `source` into `out_folder`: {train,valid}.{bin,idx}, the tokenizer, meta.json.

    Every document of text ends with eos; conversations end as their template says, or with eos, and
    have {train,valid}.targets too. If the folder already has the same text with the same settings,
    nothing is done. If an earlier call was interrupted, this one continues.

    Args:
        source: text to tokenize.
        out_folder: destination.
        settings: settings of the tokenization.
        tokenizer: name or path for `open_tokenizer`. None: train one on the train split.
        overwrite: whether to replace a token folder with other contents.
        progress: called with the progress of each stage.

    Raises:
        ValueError: an input is invalid or changes while it is read; the folder exists with other
            contents and `overwrite` is False, or is not a token folder; or another process is
            building it.
    """
    given = None if tokenizer is None else open_tokenizer(tokenizer, settings.special_tokens)
    check_settings(settings, given, tokenizer)
    listing = scan_source(source)
    files = listing.files
    if settings.chat_template is not None:
        check_files(files)
    total = sum(file.size for file in files)
    source_record = {
        "path": str(source.path),
        "files": len(files),
        "bytes": total,
        "digest": digest_files(files, _byte_counter("reading", total, progress)),
        "seen": listing.seen,
        "left_out": listing.left_out,
    }
    recorded = settings.recorded(given)
    digest = _digest([FORMAT, source_record["digest"], recorded])
    # on_error does not change the tokens of the documents that are read.
    shard_settings = {name: value for name, value in recorded.items() if name != "on_error"}
    key = _digest([FORMAT, source_record["digest"], shard_settings, CHUNK_BYTES, SHARD_BYTES])
    out = Path(out_folder)
    if _is_up_to_date(out, digest, overwrite):
        # What is left out may be other than when the folder was made.
        meta = dataclasses.replace(read_meta(out), source=source_record)
        return Prepared(out, meta, fresh=False)
    with folder_build(out, key, digest) as build:
        if not is_complete(build.folder, digest):
            chunks = _plan_chunks(files, settings)
            opened = _provide_tokenizer(build, chunks, settings, given)
            meta = _tokenize(build, chunks, opened, settings, progress)
            meta = dataclasses.replace(meta, digest=digest, source=source_record, settings=recorded)
            write_meta(build.folder, meta)
    return Prepared(out, read_meta(out), fresh=True)


def _digest(inputs: list) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _byte_counter(stage: str, total: int, progress: Progress | None) -> OnBytes:
    """Return a function that sums bytes and reports them to `progress`."""
    processed = 0

    def count(size: int) -> None:
        nonlocal processed
        processed += size
        if progress is not None:
            progress(stage, processed, total)

    return count


def _is_up_to_date(out: Path, digest: str, overwrite: bool) -> bool:
    """Return whether `out` has the wanted contents.

    Raises:
        ValueError: `out` has other contents that may not be overwritten.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / META).is_file():
        raise ValueError(
            f"{out}: exists and is not a complete token folder ({META} is missing); remove it or "
            "give another folder"
        )
    try:
        if read_meta(out).digest == digest:
            return True
    except ValueError:
        # A damaged folder may be replaced, but only on request.
        if not overwrite:
            raise
    if overwrite:
        return False
    raise ValueError(
        f"{out}: already has tokens of other text or other settings; give another folder, or "
        "replace them with --overwrite"
    )


def _plan_chunks(files: Sequence[SourceFile], settings: TokenizeSettings) -> list[PlannedChunk]:
    """Split all files into chunks and assign a split to each chunk.

    The split of a text file depends on the hash of its name. The split of a record is decided
    later, by the hash of its own name (None). A single text file is divided at a line end, and its
    last part is used for validation. If chance would select none of several text files, the file
    with the lowest hash is used for validation.
    """
    fraction, seed = settings.valid_fraction, settings.seed
    chunk_bytes = settings.document_bytes or 0
    nonempty = [file for file in files if file.size]
    text = [file for file in nonempty if not file.kind]
    if fraction and len(nonempty) == len(text) == 1:
        boundary = int(text[0].size * (1 - fraction))
        chunks = [chunk for file in files for chunk in split_file(file, [boundary], chunk_bytes)]
        return [(chunk, "valid" if chunk.start >= boundary else "train") for chunk in chunks]
    valid = {file.name for file in text if hash_fraction(seed, file.name) < fraction}
    if fraction and len(text) == len(nonempty) > 1 and not valid:
        valid = {min(text, key=lambda file: hash_fraction(seed, file.name)).name}
    return [
        (chunk, None if file.kind else "valid" if file.name in valid else "train")
        for file in files
        for chunk in split_file(file, chunk_bytes=chunk_bytes)
    ]


def _provide_tokenizer(
    build: FolderBuild,
    chunks: list[PlannedChunk],
    settings: TokenizeSettings,
    given: TextTokenizer | None,
) -> TextTokenizer:
    """Write the tokenizer's files to the folder and return it; train it if it is not there."""
    if given is not None:
        for name, content in given.files.items():
            (build.folder / name).write_bytes(content)
        if settings.chat_template is not None:
            (build.folder / TEMPLATE_FILE).write_text(settings.chat_template, "utf-8")
        return given
    file = build.folder / MODEL_FILE
    if not file.is_file():
        job = _shard_job(build, settings, None)
        partial = file.with_suffix(".partial")
        texts = _training_texts(job, chunks, settings.seed + 1)
        partial.write_bytes(train_tokenizer(texts, settings.vocab_size or 0))
        partial.rename(file)
    return open_tokenizer(file)


def _training_texts(job: ShardJob, chunks: list[PlannedChunk], seed: int) -> Iterator[str]:
    """Yield the texts of the train split; the order of chunks is drawn from their names."""
    for planned in sorted(chunks, key=lambda one: hash_fraction(seed, _chunk_name(one[0]))):
        for split, document in read_chunk(job, planned, SkipCounts()):
            if split == "train":
                yield document.text


def _chunk_name(chunk: FileChunk) -> str:
    return f"{chunk.file.name}@{chunk.start}"


def _shard_job(
    build: FolderBuild, settings: TokenizeSettings, tokenizer: TextTokenizer | None
) -> ShardJob:
    return ShardJob(
        folder=str(build.shards),
        splits=("train", "valid") if settings.valid_fraction else ("train",),
        valid_fraction=settings.valid_fraction,
        seed=settings.seed,
        add_bos=tokenizer is not None and tokenizer.add_bos,
        reading=ReadOptions(settings.on_error, settings.field, settings.chat(tokenizer)),
    )


def _tokenize(
    build: FolderBuild,
    chunks: list[PlannedChunk],
    tokenizer: TextTokenizer,
    settings: TokenizeSettings,
    progress: Progress | None,
) -> Meta:
    """Tokenize and merge all shards. Returns the meta data without digest, source and settings."""
    job, shards = _shard_job(build, settings, tokenizer), group_into_shards(chunks)
    total = sum(shard.size for shard in shards)
    count_tokenized = _byte_counter("tokenizing", total, progress)
    tokenize_shards(job, shards, build.folder, settings.workers, count_tokenized)
    count_merged = _byte_counter("joining", total, progress)
    totals = merge_shards(job, shards, build.folder, tokenizer.vocab_size, count_merged)
    if totals.skipped and settings.on_error == "refuse":
        # These shards are from an earlier call with on_error = "skip".
        raise ValueError(f"{totals.skipped[0]}: correct or remove the file, or use --on-error skip")
    for split, num_documents in totals.documents.items():
        if not num_documents:
            first = f"; the first skipped document: {totals.skipped[0]}" if totals.skipped else ""
            raise ValueError(
                f"the {split} split has no document ({len(totals.skipped)} skipped, "
                f"{totals.empty} empty): give more documents, or another valid_fraction than "
                f"{settings.valid_fraction}{first}"
            )
    return Meta(
        format=FORMAT,
        digest="",
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        fingerprint=tokenizer.fingerprint,
        documents=totals.documents,
        tokens=totals.tokens,
        source={},
        settings={},
        empty=totals.empty,
        skipped=totals.skipped,
        files=build.sizes(),
        sha256=build.digests(),
        kind=tokenizer.kind,
        targets=totals.targets,
        lengths={s: retention(document_lengths(build.folder / s)) for s in totals.tokens},
    )
