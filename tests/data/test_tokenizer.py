"""The sentencepiece tokenizer is lossless, silent and reproducible."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lcdist.data.prepare.prepare import Prepared
from lcdist.data.tokenizers.sentencepiece_bpe import SentencePieceTokenizer, train_tokenizer

TEXTS = ["def f(x):\n\treturn x + 1\n" * 20, "  the quick brown fox jumps over dogs  \n\n" * 20]
ODD = [" ", "\t", "\n", "\r\n", "▁", "a▁ b", "é", "<s>", "</s>", "<0x41>", "\0", "😀", "  x", " ⁇ "]


@pytest.fixture(scope="module")
def tokenizer(prepared: Prepared) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(prepared.folder / "tokenizer.model")


def check_round_trip(tokenizer: SentencePieceTokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert tokenizer.eos_id not in tokens and 0 not in tokens


TEXT_PIECES = st.lists(st.sampled_from(ODD) | st.text(max_size=8), max_size=12)
LENIENT = [HealthCheck.function_scoped_fixture]


def test_decoding_returns_the_text(tokenizer: SentencePieceTokenizer) -> None:
    for first, second in itertools.product(ODD, ODD):
        check_round_trip(tokenizer, first + second + first)


def random_texts(examples: int) -> Callable[..., Any]:
    """Return the decorator that gives a test `examples` lists of pieces."""
    lenient = settings(max_examples=examples, deadline=None, suppress_health_check=LENIENT)
    return lambda test: given(pieces=TEXT_PIECES)(lenient(test))


@random_texts(40)
def test_decoding_returns_random_texts(tokenizer: SentencePieceTokenizer, pieces: list[str]):
    check_round_trip(tokenizer, "".join(pieces))


@pytest.mark.exhaustive
@random_texts(1000)
def test_decoding_returns_many_random_texts(tokenizer: SentencePieceTokenizer, pieces: list[str]):
    check_round_trip(tokenizer, "".join(pieces))


def test_training_is_repeatable_and_silent(capfd: pytest.CaptureFixture[str]) -> None:
    assert train_tokenizer(TEXTS, 300) == train_tokenizer(iter(TEXTS), 300)
    with pytest.raises(ValueError, match="--vocab-size 5000.*it has 368 at most"):
        train_tokenizer(TEXTS, 5000)
    assert capfd.readouterr() == ("", "")


def test_training_reads_a_limited_amount_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcdist.data.tokenizers.sentencepiece_bpe.TRAIN_BYTES", 5000)
    assert train_tokenizer(itertools.chain(TEXTS, itertools.repeat("and so on")), 300)


def test_an_error_of_the_corpus_is_raised_unchanged() -> None:
    def texts():
        yield TEXTS[0]
        raise ValueError("bad file")

    with pytest.raises(ValueError, match="^bad file$"):
        train_tokenizer(texts(), 300)


def test_invalid_input_raises(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size = 200: must be at least 300"):
        train_tokenizer(TEXTS, 200)
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer(["", ""], 300)
    with pytest.raises(ValueError, match="nowhere.model: no such file"):
        SentencePieceTokenizer(tmp_path / "nowhere.model")
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match="junk.model: not a sentencepiece model"):
        SentencePieceTokenizer(tmp_path / "junk.model")
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode("a\ud800")
    with pytest.raises(ValueError, match=f"token 320: .*0..{tokenizer.vocab_size - 1}"):
        tokenizer.decode([5, 320])
