"""Any tokenizer by its file or folder: sentencepiece, Hugging Face's, or bytes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from lcdist.data.meta import META
from lcdist.data.tokenizers.byte_tokenizer import BYTES_FILE, ByteTokenizer
from lcdist.data.tokenizers.huggingface import HF_FILE, HuggingFaceTokenizer, SpecialTokens
from lcdist.data.tokenizers.sentencepiece_bpe import MODEL_FILE, Tokenizer

BYTES = "bytes"


class TextTokenizer(Protocol):
    """Text to token numbers and back.

    fingerprint: sha256, in hex, of what decides the numbers. begins: whether a document begins
    with bos. files: by name, what a token folder keeps so that it can be opened there.
    """

    kind: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    begins: bool
    fingerprint: str

    @property
    def files(self) -> Mapping[str, bytes]: ...

    def encode(self, text: str) -> list[int]:
        """The token numbers of `text`, no bos and no eos."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`."""
        ...


def open_tokenizer(path: str | Path, specials: SpecialTokens | None = None) -> TextTokenizer:
    """The tokenizer that `path` names.

    path: "bytes", a sentencepiece .model, a tokenizer.json, or a folder with one of these: a token
    folder, or that of a model. specials: what was asked for about the ends of documents. Raises
    ValueError where there is none, or where it has no token that ends a text.
    """
    if str(path) == BYTES:
        return _plain(ByteTokenizer, specials)
    place = Path(path)
    if place.is_dir():
        if (place / META).is_file():
            specials = _as_made(place, specials)
        if (place / BYTES_FILE).is_file():
            return _plain(ByteTokenizer, specials)
        found = [place / name for name in (HF_FILE, MODEL_FILE) if (place / name).is_file()]
        if not found:
            raise ValueError(
                f"tokenizer {path}: the folder holds no {HF_FILE} and no {MODEL_FILE}; name a "
                f"tokenizer's file, or '{BYTES}'"
            )
        place = found[0]
    if place.suffix == ".json":
        return HuggingFaceTokenizer(place, specials)
    return _plain(lambda begins=False: Tokenizer(place, begins), specials)


def bos_prefix(tokenizer: TextTokenizer) -> list[int]:
    """The tokens before a document's text: bos, or none."""
    return [tokenizer.bos_id] if tokenizer.begins and tokenizer.bos_id is not None else []


def _plain(make, specials: SpecialTokens | None) -> TextTokenizer:
    asked = specials or SpecialTokens()
    if asked.bos is not None or asked.eos is not None:
        raise ValueError(
            "--bos-token and --eos-token are for a tokenizer.json alone: bytes and a sentencepiece "
            "model know their own"
        )
    return make(begins=bool(asked.add_bos))


def _as_made(folder: Path, specials: SpecialTokens | None) -> SpecialTokens:
    """A token folder's tokenizer begins documents as those in the folder do."""
    asked = specials or SpecialTokens()
    settings = json.loads((folder / META).read_text("utf-8")).get("settings") or {}
    kept = settings.get("add_bos")
    return replace(asked, add_bos=kept) if asked.add_bos is None else asked
