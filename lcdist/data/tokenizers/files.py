"""Open a tokenizer from its file or folder: sentencepiece, Hugging Face, or bytes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from lcdist.data.meta import META, REMAKE
from lcdist.data.tokenizers.byte_tokenizer import BYTES_FILE, ByteTokenizer
from lcdist.data.tokenizers.huggingface import HF_FILE, HuggingFaceTokenizer, SpecialTokens
from lcdist.data.tokenizers.sentencepiece_bpe import MODEL_FILE, SentencePieceTokenizer
from lcdist.utils.json_file import read_object

BYTES = "bytes"


class TextTokenizer(Protocol):
    """Interface of tokenizers: convert text to token numbers and back.

    Attributes:
        kind: "sentencepiece", "huggingface" or "bytes".
        vocab_size: number of rows that an embedding needs.
        eos_id: token that ends a document.
        bos_id: token that begins a document, or None.
        add_bos: whether documents begin with bos.
        fingerprint: sha256, in hex, of everything that determines the token numbers.
        files: contents by name of the files that a token folder keeps, to open the tokenizer again.
    """

    kind: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    add_bos: bool
    fingerprint: str

    @property
    def files(self) -> Mapping[str, bytes]: ...

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text` without bos and eos."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`."""
        ...


def open_tokenizer(path: str | Path, special_tokens: SpecialTokens | None = None) -> TextTokenizer:
    """Open the tokenizer at `path`.

    Args:
        path: "bytes", a sentencepiece .model, a tokenizer.json, or a folder that contains one of
            them: a token folder or a model's folder.
        special_tokens: requested tokens at the ends of documents.

    Raises:
        ValueError: there is no tokenizer, or it has no token that ends a text.
    """
    if str(path) == BYTES:
        return _open_without_names(ByteTokenizer, special_tokens)
    file = Path(path)
    if file.is_dir():
        if (file / META).is_file():
            special_tokens = _recorded_special_tokens(file, special_tokens)
        if (file / BYTES_FILE).is_file():
            return _open_without_names(ByteTokenizer, special_tokens)
        candidates = [file / name for name in (HF_FILE, MODEL_FILE) if (file / name).is_file()]
        if not candidates:
            raise ValueError(
                f"tokenizer {path}: the folder has no {HF_FILE} and no {MODEL_FILE}; name a "
                f"tokenizer's file, or '{BYTES}'"
            )
        file = candidates[0]
    if file.suffix == ".json":
        return HuggingFaceTokenizer(file, special_tokens)
    return _open_without_names(
        lambda add_bos=False: SentencePieceTokenizer(file, add_bos), special_tokens
    )


def bos_prefix(tokenizer: TextTokenizer) -> list[int]:
    """Return the tokens before a document's text: [bos] or []."""
    return [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []


def _open_without_names(
    make: Callable[..., TextTokenizer], special_tokens: SpecialTokens | None
) -> TextTokenizer:
    """Open a tokenizer whose bos and eos cannot be chosen by name."""
    requested = special_tokens or SpecialTokens()
    if requested.bos is not None or requested.eos is not None:
        raise ValueError(
            "--bos-token and --eos-token apply to a tokenizer.json only: bytes and sentencepiece "
            "models define these tokens themselves"
        )
    return make(add_bos=bool(requested.add_bos))


def _recorded_special_tokens(folder: Path, special_tokens: SpecialTokens | None) -> SpecialTokens:
    """Return `special_tokens`, with add_bos as recorded in a token folder if it is None."""
    requested = special_tokens or SpecialTokens()
    settings = read_object(folder / META, {"settings": dict}, REMAKE)["settings"]
    recorded = settings.get("add_bos")
    if not isinstance(recorded, bool):
        recorded = None
    return replace(requested, add_bos=recorded) if requested.add_bos is None else requested
