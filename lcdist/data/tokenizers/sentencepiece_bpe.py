"""Text to token numbers and back without loss: sentencepiece BPE with byte fallback.

Byte-pair encoding after arXiv:1508.07909, as sentencepiece implements it (arXiv:1808.06226).
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import sentencepiece

MODEL_FILE = "tokenizer.model"
# Bounds the time and memory of training; 16 MiB of code take about two seconds.
TRAIN_BYTES = 16 * 2**20
# The trainer counts words per sentence; its own limit of 4,192 bytes would drop longer ones.
_SENTENCE = 2000
# sentencepiece writes a space as this character, so a real one has to go in as bytes.
_SPACE_MARK = "\u2581"


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    budget = TRAIN_BYTES
    for text in texts:
        # The trainer drops every sentence that holds a tab.
        clean = text.replace("\t", " ").replace(_SPACE_MARK, " ")
        for start in range(0, len(clean), _SENTENCE):
            sentence = clean[start : start + _SENTENCE]
            budget -= len(sentence.encode())
            if budget < 0:
                return
            yield sentence


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """The bytes of a sentencepiece model of `vocab_size` pieces, trained on `texts`.

    Reads at most `TRAIN_BYTES` of text; the same texts give the same bytes. Piece 0 is the
    unknown, piece 1 the end of a document (eos). Raises ValueError where there is no text, or
    where the text does not hold `vocab_size` pieces.
    """
    if vocab_size < 300:
        raise ValueError(
            f"vocab_size = {vocab_size}: must be at least 300, 256 of them stand for the bytes"
        )
    # A list, because the trainer would wrap an error raised by an iterator in one of its own.
    sentences = list(_sentences(texts))
    if not sentences:
        raise ValueError("no text to train a tokenizer on: every document is empty")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=8 * _SENTENCE,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"no tokenizer of {vocab_size} pieces can be trained on this text ({reason}): "
            "give more text, another vocab_size, or a trained tokenizer"
        ) from error
    return model.getvalue()


class Tokenizer:
    """A trained sentencepiece model.

    For models of `train_tokenizer`, `decode(encode(text)) == text` for every text that UTF-8 can
    hold. begins: whether documents begin with bos. Raises ValueError where the file is missing, is
    no sentencepiece model, has no eos, or has no bos where one is asked for.
    """

    kind = "sentencepiece"

    def __init__(self, path: str | Path, begins: bool = False) -> None:
        if not Path(path).is_file():
            raise ValueError(f"tokenizer {path}: no such file; give a sentencepiece .model")
        model = self._bytes = Path(path).read_bytes()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"tokenizer {path}: not a sentencepiece model ({error})") from error
        self.fingerprint: str = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._model.get_piece_size()
        self.eos_id: int = self._model.eos_id()
        if self.eos_id < 0:
            raise ValueError(
                f"tokenizer {path}: has no end-of-sentence piece to part documents with; "
                "train it with eos_id >= 0"
            )
        bos_id = self._model.bos_id()
        self.bos_id: int | None = bos_id if bos_id >= 0 else None
        self.begins = begins
        if begins and self.bos_id is None:
            raise ValueError(f"tokenizer {path}: has no piece that begins a text; no --add-bos")
        mark = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._mark: list[int] = mark if all(map(self._model.is_byte, mark)) else []

    @property
    def files(self) -> Mapping[str, bytes]:
        """What a token folder keeps of it."""
        return {MODEL_FILE: self._bytes}

    def encode(self, text: str) -> list[int]:
        """The token numbers of `text`, no eos. Raises ValueError on a lone surrogate."""
        text.encode()
        if not self._mark or _SPACE_MARK not in text:
            return self._model.encode(text)
        first, *rest = (self._model.encode(part) for part in text.split(_SPACE_MARK))
        return first + [token for part in rest for token in (*self._mark, *part)]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`; eos has none. Raises ValueError on a number without a piece."""
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token {token}: this tokenizer has the numbers 0..{self.vocab_size - 1}"
                )
        return self._model.decode([int(token) for token in tokens])
