"""Fixtures: a small corpus and the token folder made from it."""

import random
from pathlib import Path

import pytest

from lcdist.data.prepare.corpus import Source
from lcdist.data.prepare.prepare import Prepared, prepare
from lcdist.data.prepare.settings import TokenizeSettings

SETTINGS = TokenizeSettings(vocab_size=320, valid_fraction=0.2, seed=0, on_error="refuse")


def write_corpus(folder: Path, documents: int = 40) -> Path:
    """Write text files of different lengths, one of them empty, to two folders."""
    draw = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta = 3", "\tepsilon", "    zeta", "eta\n", "é", "\n\n"]
    for number in range(documents):
        text = " ".join(draw.choices(words, k=draw.randrange(20, 200)))
        file = folder / ("even" if number % 2 == 0 else "odd") / f"{number:02}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    (folder / "odd" / "nothing.txt").touch()
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(Source(corpus), tmp_path_factory.mktemp("out") / "tokens", SETTINGS)
