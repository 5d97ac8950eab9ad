"""From text to a folder of tokens: tokenizer, train and valid split in Megatron's indexed format.

The folder is built beside its place and renamed when it is whole, so a folder with its name is a
whole one. What comes out depends on texts, names and settings alone, not on machine or processes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lcdist.data.meta import FORMAT, META, Meta, read_meta, write_meta
from lcdist.data.prepare.chunks import PART_BYTES, FileChunk, ReadOptions, SkipCounts, cut
from lcdist.data.prepare.corpus import Source, SourceFile, digest_files, list_files, share, walk
from lcdist.data.prepare.folder_build import FolderBuild, folder_build, is_whole
from lcdist.data.prepare.settings import TokenizeSettings, check_settings
from lcdist.data.prepare.shards import SHARD_BYTES, ShardJob, drawn_documents, join, shards_of
from lcdist.data.prepare.workers import tokenize_all
from lcdist.data.tokenizers.files import TextTokenizer, open_tokenizer
from lcdist.data.tokenizers.sentencepiece_bpe import MODEL_FILE, train_tokenizer

# Called with what is being done, the bytes of input done and the bytes there are.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prepared:
    """A whole token folder; `fresh` is False where it was already there."""

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

    tokenizer: what `open_tokenizer` opens; None trains one on the train split. Every document ends
    with eos. Where the folder already holds the same text under the same settings nothing is done;
    where an earlier call was interrupted, it goes on. Raises ValueError on bad input, where the
    folder holds anything else and `overwrite` is False, where it is no token folder at all, and
    where another process is making it.
    """
    given = None if tokenizer is None else open_tokenizer(tokenizer, settings.special_tokens)
    check_settings(settings, given, tokenizer)
    files = list_files(source)
    total = sum(file.size for file in files)
    described = {
        "path": str(source.path),
        "files": len(files),
        "bytes": total,
        "digest": digest_files(files, _counter("reading", total, progress)),
        "left_out": walk(source)[1],
    }
    recorded = settings.recorded(given)
    digest = _digest([FORMAT, described["digest"], recorded])
    # What is skipped and what is refused gives the same tokens as far as it goes.
    basis = {key: value for key, value in recorded.items() if key != "on_error"}
    key = _digest([FORMAT, described["digest"], basis, PART_BYTES, SHARD_BYTES])
    out = Path(out_folder)
    if _taken(out, digest, overwrite):
        return Prepared(out, read_meta(out), fresh=False)
    with folder_build(out, key, digest) as at:
        if not is_whole(at.folder, digest):
            plan = _plan(files, settings)
            opened = _tokenizer(at, plan, settings, given)
            meta = _tokenize(at, plan, opened, settings, progress)
            meta = dataclasses.replace(meta, digest=digest, source=described, settings=recorded)
            write_meta(at.folder, meta)
    return Prepared(out, read_meta(out), fresh=True)


def _digest(inputs: list) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _counter(stage: str, total: int, progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(stage, done, total)

    return count


def _taken(out: Path, digest: str, overwrite: bool) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / META).is_file():
        raise ValueError(
            f"{out}: exists and is no whole token folder ({META} is missing); remove it or give "
            "another folder"
        )
    try:
        if read_meta(out).digest == digest:
            return True
    except ValueError:
        # A damaged folder may be replaced, but only by who says so.
        if not overwrite:
            raise
    if overwrite:
        return False
    raise ValueError(
        f"{out}: already holds tokens of other text or of other settings; give another folder, "
        "or tell it to overwrite"
    )


def _plan(
    files: Sequence[SourceFile], settings: TokenizeSettings
) -> list[tuple[FileChunk, str | None]]:
    """Parts and their splits: text files by the hash of their names, records by theirs (None).

    A lone text file is cut in two at a line end, its last part for validation; of several, the
    one drawn first goes there if chance would send none.
    """
    fraction, seed, size = settings.valid_fraction, settings.seed, settings.document_bytes or 0
    full = [file for file in files if file.size]
    text = [file for file in full if not file.kind]
    if fraction and len(full) == len(text) == 1:
        border = int(text[0].size * (1 - fraction))
        parts = [part for file in files for part in cut(file, [border], size)]
        return [(part, "valid" if part.start >= border else "train") for part in parts]
    valid = {file.name for file in text if share(seed, file.name) < fraction}
    if fraction and len(text) == len(full) > 1 and not valid:
        valid = {min(text, key=lambda file: share(seed, file.name)).name}
    return [
        (part, None if file.kind else "valid" if file.name in valid else "train")
        for file in files
        for part in cut(file, part_bytes=size)
    ]


def _tokenizer(
    at: FolderBuild,
    plan: list[tuple[FileChunk, str | None]],
    settings: TokenizeSettings,
    given: TextTokenizer | None,
) -> TextTokenizer:
    """The tokenizer, its files in the folder being built; a trained one is trained once."""
    if given is not None:
        for name, content in given.files.items():
            (at.folder / name).write_bytes(content)
        return given
    file = at.folder / MODEL_FILE
    if not file.is_file():
        work = _work(at, settings, add_bos=False)
        partial = file.with_suffix(".partial")
        texts = _training_texts(work, plan, settings.seed + 1)
        partial.write_bytes(train_tokenizer(texts, settings.vocab_size or 0))
        partial.rename(file)
    return open_tokenizer(file)


def _training_texts(
    work: ShardJob, plan: list[tuple[FileChunk, str | None]], seed: int
) -> Iterator[str]:
    """Texts of the train split, part after part in an order drawn from the names."""
    for part, split in sorted(plan, key=lambda one: share(seed, _part_name(one[0]))):
        for drawn, document in drawn_documents(work, part, split, SkipCounts()):
            if drawn == "train":
                yield document.text


def _part_name(part: FileChunk) -> str:
    return f"{part.file.name}@{part.start}"


def _work(at: FolderBuild, settings: TokenizeSettings, add_bos: bool) -> ShardJob:
    return ShardJob(
        folder=str(at.shards),
        splits=("train", "valid") if settings.valid_fraction else ("train",),
        valid_fraction=settings.valid_fraction,
        seed=settings.seed,
        add_bos=add_bos,
        reading=ReadOptions(settings.on_error, settings.field),
    )


def _tokenize(
    at: FolderBuild,
    plan: list[tuple[FileChunk, str | None]],
    tokenizer: TextTokenizer,
    settings: TokenizeSettings,
    progress: Progress | None,
) -> Meta:
    work, shards = _work(at, settings, tokenizer.begins), shards_of(plan)
    total = sum(shard.size for shard in shards)
    count = _counter("tokenizing", total, progress)
    tokenize_all(work, shards, at.folder, settings.workers, count)
    done = join(work, shards, at.folder, tokenizer.vocab_size, _counter("joining", total, progress))
    if done.skipped and settings.on_error == "refuse":
        # Shards of an earlier try that was told to skip.
        raise ValueError(f"{done.skipped[0]}: mend the file, take it out, or use --on-error skip")
    for name, documents in done.documents.items():
        if not documents:
            raise ValueError(
                f"the {name} split holds no document ({len(done.skipped)} skipped, {done.empty} "
                f"empty): give more documents, or another valid_fraction than "
                f"{settings.valid_fraction}{_first(done.skipped)}"
            )
    return Meta(
        format=FORMAT,
        digest="",
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        fingerprint=tokenizer.fingerprint,
        documents=done.documents,
        tokens=done.tokens,
        source={},
        settings={},
        empty=done.empty,
        skipped=done.skipped,
        files=at.sizes(),
        kind=tokenizer.kind,
    )


def _first(skipped: list[dict]) -> str:
    return f"; the first that was skipped: {skipped[0]}" if skipped else ""


def summary_lines(prepared: Prepared) -> list[str]:
    """What was made and what was left out, a line each, for people."""
    meta = prepared.meta
    counts = ", ".join(f"{n:,} tokens for {split}" for split, n in meta.tokens.items())
    state = "wrote" if prepared.fresh else "already done:"
    lines = [f"{state} {prepared.folder}: {counts}, vocabulary of {meta.vocab_size}"]
    left = meta.source.get("left_out") or {}
    if left:
        named = ", ".join(f"{n} {ending or 'without ending'}" for ending, n in left.items())
        lines.append(f"left out files of other endings: {named}")
    if meta.skipped:
        lines.append(f"skipped {len(meta.skipped)} unreadable pieces, listed in {META}; the first:")
    for entry in meta.skipped[:3]:
        unit = next((f", {u} {entry[u]}" for u in ("line", "row") if entry.get(u)), "")
        lines.append(f"  {entry['file']}{unit}: {entry['reason']}")
    return lines
