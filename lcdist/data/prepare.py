"""From text to a folder of tokens: tokenizer, train and valid split in Megatron's indexed format.

The folder is built beside its place and renamed when it is whole, so a folder with its name is a
whole one. What comes out depends on texts, names and settings alone, not on machine or threads.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lcdist.data.corpus import (
    Document,
    OnError,
    Part,
    Source,
    SourceFile,
    cut,
    digest_files,
    documents,
    list_files,
    share,
)
from lcdist.data.indexed import IndexedWriter
from lcdist.data.meta import FORMAT, META, TOKENIZER, Meta, read_meta, write_meta
from lcdist.data.tokenizer import Tokenizer, train_tokenizer

# Called with the bytes of text done and the bytes there are.
Progress = Callable[[int, int], None]
_BATCH_CHARS = 4 * 2**20


@dataclass(frozen=True)
class Settings:
    """What a token folder depends on besides its text.

    vocab_size: pieces of the tokenizer (None: as many as the given tokenizer has).
    valid_fraction: share of documents, in [0, 1), that are kept out of training. seed: of the
    split. on_error: "refuse" or "skip" what cannot be read. threads: used for tokenizing; they do
    not change the result.
    """

    vocab_size: int | None
    valid_fraction: float
    seed: int
    on_error: OnError
    threads: int


@dataclass(frozen=True)
class Prepared:
    """A whole token folder; `fresh` is False where it was already there."""

    folder: Path
    meta: Meta
    fresh: bool


@dataclass(frozen=True)
class _Plan:
    """The parts of a corpus and which split each belongs to (None: decided by document)."""

    parts: list[Part]
    splits: list[str | None]
    settings: Settings

    def documents(self, number: int, skipped: list[dict]) -> Iterator[tuple[str, Document]]:
        """The documents of part `number`, each with its split."""
        for document in documents(self.parts[number], self.settings.on_error, skipped):
            yield self.splits[number] or self._drawn(document.name), document

    def _drawn(self, name: str) -> str:
        settings = self.settings
        return "valid" if share(settings.seed, name) < settings.valid_fraction else "train"

    def training_texts(self) -> Iterator[str]:
        """Texts of the train split, part after part in an order drawn from the names."""
        order = range(len(self.parts))
        name = [f"{part.file.name}@{part.start}" for part in self.parts]
        for number in sorted(order, key=lambda i: share(self.settings.seed + 1, name[i])):
            for split, document in self.documents(number, []):
                if split == "train":
                    yield document.text


def prepare(
    source: Source,
    out_folder: str | Path,
    settings: Settings,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Tokenize `source` into `out_folder`: {train,valid}.{bin,idx}, tokenizer.model, meta.json.

    tokenizer: a sentencepiece .model to use; None trains one on the train split. Every document
    ends with eos. Where the folder already holds the same text under the same settings nothing is
    done. Raises ValueError on bad input, where the folder holds anything else and `overwrite` is
    False, where it is no token folder at all, and where another process is making it.
    """
    given = None if tokenizer is None else Tokenizer(tokenizer)
    _check(settings, given, tokenizer)
    files = list_files(source)
    described = {
        "path": str(source.path),
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "digest": digest_files(files),
    }
    recorded = dataclasses.asdict(settings)
    del recorded["threads"]
    recorded["tokenizer"] = given and given.fingerprint
    inputs = json.dumps([FORMAT, described["digest"], recorded], sort_keys=True)
    digest = hashlib.sha256(inputs.encode()).hexdigest()
    out = Path(out_folder)
    if _taken(out, digest, overwrite):
        return Prepared(out, read_meta(out), fresh=False)
    with _building(out) as partial:
        plan = _plan(files, settings)
        model = (
            train_tokenizer(plan.training_texts(), settings.vocab_size or 0)
            if tokenizer is None
            else Path(tokenizer).read_bytes()
        )
        (partial / TOKENIZER).write_bytes(model)
        meta = _tokenize(plan, partial, progress)
        meta = dataclasses.replace(meta, digest=digest, source=described, settings=recorded)
        write_meta(partial, meta)
    return Prepared(out, read_meta(out), fresh=True)


def _check(settings: Settings, given: Tokenizer | None, tokenizer: str | Path | None) -> None:
    if given is None and settings.vocab_size is None:
        raise ValueError("give a vocab_size to train a tokenizer, or a trained tokenizer")
    if given is not None and settings.vocab_size not in (None, given.vocab_size):
        raise ValueError(
            f"vocab_size = {settings.vocab_size}, but the tokenizer {tokenizer} has "
            f"{given.vocab_size} pieces: leave vocab_size out, or leave the tokenizer out to "
            "train one"
        )
    if not 0 <= settings.valid_fraction < 1:
        raise ValueError(f"valid_fraction = {settings.valid_fraction}: must be in [0, 1)")
    if settings.threads < 1:
        raise ValueError(f"threads = {settings.threads}: must be at least 1")
    if settings.on_error not in ("refuse", "skip"):
        raise ValueError(f"on_error = {settings.on_error!r}: must be 'refuse' or 'skip'")


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


@contextlib.contextmanager
def _building(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end, and is removed on an error.

    A killed process leaves it behind, without meta.json until it is whole; the next one, which
    can lock it then, empties it.
    """
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not partial.exists() or os.fstat(lock).st_ino != partial.stat().st_ino:
            raise BlockingIOError
    except BlockingIOError:
        os.close(lock)
        raise ValueError(
            f"{out}: another process is making it; wait for that one, or give another folder"
        ) from None
    try:
        for old in partial.iterdir():
            old.unlink()
        yield partial
        replaced = out.with_name(f".{out.name}.replaced")
        if out.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            out.rename(replaced)
        partial.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _plan(files: Sequence[SourceFile], settings: Settings) -> _Plan:
    """Parts and splits: text files by the hash of their names, lines of JSONL by theirs.

    A lone text file is cut in two at a line end, its last part for validation; of several, the
    one drawn first goes there if chance would send none.
    """
    fraction, seed = settings.valid_fraction, settings.seed
    full = [file for file in files if file.size]
    text = [file for file in full if file.path.suffix != ".jsonl"]
    if fraction and len(full) == len(text) == 1:
        border = int(text[0].size * (1 - fraction))
        parts = [part for file in files for part in cut(file, [border])]
        return _Plan(
            parts, ["valid" if part.start >= border else "train" for part in parts], settings
        )
    valid = {file.name for file in text if share(seed, file.name) < fraction}
    if fraction and len(text) == len(full) > 1 and not valid:
        valid = {min(text, key=lambda file: share(seed, file.name)).name}
    parts = [part for file in files for part in cut(file)]
    named = ["valid" if part.file.name in valid else "train" for part in parts]
    splits = [None if part.is_jsonl else name for part, name in zip(parts, named, strict=True)]
    return _Plan(parts, splits, settings)


def _batches(plan: _Plan, skipped: list[dict]) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """Documents as (split, text) in lots of about `_BATCH_CHARS`, with the bytes read so far."""
    lot, held, read = [], 0, 0
    for number, part in enumerate(plan.parts):
        for split, document in plan.documents(number, skipped):
            lot.append((split, document.text))
            held += len(document.text)
        read += part.stop - part.start
        if held >= _BATCH_CHARS:
            yield read, lot
            lot, held = [], 0
    yield read, lot


def _tokenize(plan: _Plan, folder: Path, progress: Progress | None) -> Meta:
    tokenizer = Tokenizer(folder / TOKENIZER)
    total = sum(part.stop - part.start for part in plan.parts)
    names = ("train", "valid") if plan.settings.valid_fraction else ("train",)
    skipped: list[dict] = []
    empty = 0
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(IndexedWriter(folder / name, tokenizer.vocab_size))
            for name in names
        }
        for read, lot in _batches(plan, skipped):
            full = [(split, text) for split, text in lot if text]
            empty += len(lot) - len(full)
            encoded = tokenizer.encode_batch([text for _, text in full], plan.settings.threads)
            for (split, _), tokens in zip(full, encoded, strict=True):
                writers[split].add([*tokens, tokenizer.eos_id])
            if progress is not None:
                progress(read, total)
        for name, writer in writers.items():
            if not writer.documents:
                raise ValueError(
                    f"the {name} split holds no document ({len(skipped)} skipped, {empty} empty): "
                    f"give more documents, or another valid_fraction than "
                    f"{plan.settings.valid_fraction}"
                )
    return Meta(
        format=FORMAT,
        digest="",
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        fingerprint=tokenizer.fingerprint,
        documents={name: writer.documents for name, writer in writers.items()},
        tokens={name: writer.tokens for name, writer in writers.items()},
        source={},
        settings={},
        empty=empty,
        skipped=skipped,
        files={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    )
