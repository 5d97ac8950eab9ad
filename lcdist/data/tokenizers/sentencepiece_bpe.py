"""Train and use sentencepiece BPE tokenizers with byte fallback, which are lossless.

Byte-pair encoding as in arXiv:1508.07909, implemented by sentencepiece (arXiv:1808.06226).
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import sentencepiece

MODEL_FILE = "tokenizer.model"
# Limits the time and memory of training; 16 MiB of code take about two seconds.
TRAIN_BYTES = 16 * 2**20
# Characters per training sentence; the trainer drops sentences above its limit, 4,192 bytes.
_SENTENCE_CHARS = 2000
# sentencepiece represents a space by this character, so a literal one is encoded as bytes.
_SPACE_MARK = "\u2581"


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts in pieces for the trainer, at most `TRAIN_BYTES` in total."""
    budget = TRAIN_BYTES
    for text in texts:
        # The trainer drops every sentence that contains a tab.
        clean = text.replace("\t", " ").replace(_SPACE_MARK, " ")
        for start in range(0, len(clean), _SENTENCE_CHARS):
            sentence = clean[start : start + _SENTENCE_CHARS]
            budget -= len(sentence.encode())
            if budget < 0:
                return
            yield sentence


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a sentencepiece model of `vocab_size` pieces on `texts` and return its bytes.

    At most `TRAIN_BYTES` of text are used. The same texts give the same bytes. Piece 0 is the
    unknown token, piece 1 ends a document (eos).

    Raises:
        ValueError: vocab_size is below 300, there is no text, or the text has fewer possible
            pieces than `vocab_size`.
    """
    if vocab_size < 300:
        raise ValueError(
            f"vocab_size = {vocab_size}: must be at least 300; 256 pieces are the bytes"
        )
    # A list: the trainer would hide an error that an iterator raises behind its own error.
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
            max_sentence_length=8 * _SENTENCE_CHARS,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        most = re.search(r"a value <= (\d+)", reason)
        if most:
            reason = f"it has {most[1]} at most"
        raise ValueError(
            f"--vocab-size {vocab_size}: so many pieces cannot be trained on this text ({reason}); "
            "give more text, another size, or a trained tokenizer with --tokenizer"
        ) from error
    return model.getvalue()


class SentencePieceTokenizer:
    """A trained sentencepiece model.

    For models of `train_tokenizer`, `decode(encode(text)) == text` for every text that UTF-8 can
    represent.

    Args:
        path: the .model file.
        add_bos: whether documents begin with bos.

    Raises:
        ValueError: the file is missing or not a sentencepiece model, it has no eos, or add_bos is
            set and it has no bos.
    """

    kind = "sentencepiece"

    def __init__(self, path: str | Path, add_bos: bool = False) -> None:
        if not Path(path).is_file():
            raise ValueError(f"tokenizer {path}: no such file; give a sentencepiece .model")
        model = self._bytes = Path(path).read_bytes()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model)
        except (RuntimeError, UnicodeDecodeError) as error:
            # The second is the library's: its own message quotes the damaged bytes.
            raise ValueError(f"tokenizer {path}: not a sentencepiece model ({error})") from error
        self.fingerprint: str = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._model.get_piece_size()
        self.eos_id: int = self._model.eos_id()
        if self.eos_id < 0:
            raise ValueError(
                f"tokenizer {path}: has no end-of-sentence piece to separate documents; "
                "train it with eos_id >= 0"
            )
        bos_id = self._model.bos_id()
        self.bos_id: int | None = bos_id if bos_id >= 0 else None
        self.add_bos = add_bos
        if add_bos and self.bos_id is None:
            raise ValueError(
                f"tokenizer {path}: has no piece that begins a text; leave --add-bos out"
            )
        mark_bytes = [self._model.piece_to_id(f"<0x{b:02X}>") for b in _SPACE_MARK.encode()]
        # Byte tokens of a literal space mark; empty if the model has no byte fallback.
        has_bytes = all(map(self._model.is_byte, mark_bytes))
        self._mark_tokens: list[int] = mark_bytes if has_bytes else []

    @property
    def files(self) -> Mapping[str, bytes]:
        """Files that a token folder keeps, by name."""
        return {MODEL_FILE: self._bytes}

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text` without eos. Raises ValueError on a lone surrogate."""
        text.encode()
        if not self._mark_tokens or _SPACE_MARK not in text:
            return self._model.encode(text)
        first, *rest = (self._model.encode(piece) for piece in text.split(_SPACE_MARK))
        return first + [token for piece in rest for token in (*self._mark_tokens, *piece)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`; eos has none. Raises ValueError if one is not a token."""
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token {token}: the tokens of this tokenizer are 0..{self.vocab_size - 1}"
                )
        return self._model.decode([int(token) for token in tokens])
