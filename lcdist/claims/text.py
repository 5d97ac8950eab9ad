"""Text that the models of the claims are trained on: half real, half made to teach retrieval.

Real text alone, read for minutes, teaches no small model to look a number up. The other half is
made by seed: passkeys as the evaluation hides them, of other numbers, and lines to be copied.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lcdist.data.prepare.corpus import Source, scan_source, standard_library
from lcdist.data.prepare.prepare import prepare
from lcdist.data.prepare.settings import TokenizeSettings
from lcdist.evaluate.tasks.draws import Draws
from lcdist.evaluate.tasks.passkey import DIGITS, passkey_question
from lcdist.evaluate.tasks.words import NOUNS
from lcdist.utils.atomic import write_file

STDLIB = "stdlib"
DEBIAN = Path("/usr/share/doc")
REAL, MADE = "real", "made"
VALID_FRACTION = 0.1
# A cut of a long file, so that a text of a few megabytes comes from many files.
_DOCUMENT_CHARS = 30_000


@dataclass(frozen=True)
class TextSettings:
    """Describe the text of a profile.

    Attributes:
        source: "stdlib", with Debian's documentation where there is any, or a folder or file.
        real_bytes: of real text, at most.
        made: number of made samples.
        filler: most sentences of filler of a made passkey.
        items: most words of a made line.
        vocab_size: pieces of the tokenizer, which is trained on both halves.
        seed: of all that is drawn.
    """

    source: str
    real_bytes: int
    made: int
    filler: int
    items: int
    vocab_size: int
    seed: int = 0


def made_sample(settings: TextSettings, number: int) -> str:
    """Return sample `number`: of five in turn, two passkeys and one of each other kind.

    A passkey with its answer; its key alone, asked for several times; a line of words, each once,
    several times; a line of numbers, several times. In lines of words, what follows a token is what
    followed it before: the simplest thing to learn, from which the others follow. Words and not
    letters, as a word that is not copied costs far more nats: a small model that trained for three
    million tokens on lines of letters had not learned to copy them.
    """
    draws, kind = Draws(settings.seed, "claims", number), number % 5
    if kind in (0, 3):
        size = draws.part("size").between(0, settings.filler)
        before = draws.part("place").between(0, size)
        key = _number(draws.part("key"))
        question = passkey_question(key, before, size - before)
        return f"{question.text}{question.prefix} {key}."
    times = draws.part("times").between(3, 6)
    if kind == 1:
        question = passkey_question(_number(draws.part("key")), 0, 0)
        # Without the instruction, most of the tokens are those of the key.
        told = question.text.partition("\n")[2]
        return f"{told}{question.prefix} {question.references[0]}.\n" * times
    return f"{_line(draws, settings.items, are_numbers=kind == 4)}\n" * times


def _line(draws: Draws, most: int, are_numbers: bool) -> str:
    """Return between a quarter and all of `most` words, each once, or a quarter of the numbers."""
    least = max(2, most // 4)
    count, items = draws.part("count").between(least, max(least, most)), draws.part("items")
    if are_numbers:
        return " ".join(_number(items) for _ in range(1 + count // 4))
    return " ".join(NOUNS[n] for n in items.sample(len(NOUNS), min(count, len(NOUNS))))


def _number(draws: Draws) -> str:
    return str(draws.between(10 ** (DIGITS - 1), 10**DIGITS - 1))


def real_documents(source: str, limit: int) -> Iterator[str]:
    """Yield real text in pieces of about equal size, at most `limit` bytes.

    Files are taken in the order of a hash of their names, so that a limit leaves out any of them.
    """
    left = limit
    for path in _files(source, limit):
        text = path.read_text(encoding="utf-8", errors="replace")
        for start in range(0, len(text), _DOCUMENT_CHARS):
            piece = text[start : start + _DOCUMENT_CHARS]
            left -= len(piece.encode())
            if left < 0:
                return
            yield piece


def _files(source: str, limit: int) -> Iterable[Path]:
    if source != STDLIB:
        return [file.path for file in scan_source(Source(source, max_bytes=limit)).files]
    # Two thirds of the library, so that the documentation has a place.
    of_library = standard_library(limit * 2 // 3 if DEBIAN.is_dir() else limit)
    found = [file.path for file in scan_source(of_library).files]
    if DEBIAN.is_dir():
        documents = Source(DEBIAN, (".txt", ".md", ".rst"), max_bytes=limit // 3)
        found += [file.path for file in scan_source(documents).files]
    return found


def write_text(folder: Path, settings: TextSettings) -> None:
    """Write the token folders `real` and `made` with one tokenizer; nothing if they are there.

    Args:
        folder: that holds both; `all` beside them has the tokenizer.
        settings: what the text is.

    Raises:
        ValueError: there is no text, or the folder holds another one.
    """
    asked = json.dumps(vars(settings), indent=1) + "\n"
    done = folder / "text.json"
    if done.exists():
        if done.read_text(encoding="utf-8") != asked:
            raise ValueError(
                f"{folder} holds text of other settings: remove it, or name another --runs"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    real = list(real_documents(settings.source, settings.real_bytes))
    if not real:
        raise ValueError(f"--text {settings.source}: no text in it")
    made = [made_sample(settings, number) for number in range(settings.made)]
    everything = _tokenized(folder / "all", [*real, *made], settings, None)
    for name, documents in ((REAL, real), (MADE, made)):
        _tokenized(folder / name, documents, settings, everything)
    write_file(done, asked)


def _tokenized(
    folder: Path, documents: Sequence[str], settings: TextSettings, tokenizer: Path | None
) -> Path:
    lines = folder.with_suffix(".jsonl")
    write_file(lines, "".join(json.dumps({"text": text}) + "\n" for text in documents))
    how = TokenizeSettings(
        vocab_size=settings.vocab_size if tokenizer is None else None,
        valid_fraction=VALID_FRACTION,
        seed=settings.seed,
        on_error="refuse",
    )
    prepare(Source(lines), folder, how, tokenizer=tokenizer, overwrite=True)
    return folder
