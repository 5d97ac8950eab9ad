"""Settings of tokenization, and their checks."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from lcdist.config.values import shown
from lcdist.data.prepare.chunks import OnError, ReadOptions
from lcdist.data.tokenizers.files import TextTokenizer
from lcdist.data.tokenizers.huggingface import SpecialTokens


@dataclass(frozen=True)
class TokenizeSettings:
    """Settings that determine a token folder, besides its text.

    Attributes:
        vocab_size: pieces of the tokenizer to train. None: use the vocabulary of a given tokenizer.
        valid_fraction: share of documents, in [0, 1), that are kept out of training.
        seed: seed of the split.
        on_error: "refuse" or "skip" unreadable documents.
        field: key or column that holds the text of a record.
        document_bytes: approximate upper bound on the length of a text document. None:
            `CHUNK_BYTES`.
        special_tokens: tokens at the ends of documents.
        workers: number of processes; does not change the result.
    """

    vocab_size: int | None
    valid_fraction: float
    seed: int
    on_error: OnError
    field: str = "text"
    document_bytes: int | None = None
    special_tokens: SpecialTokens = dataclasses.field(default_factory=SpecialTokens)
    workers: int = 1

    def recorded(self, tokenizer: TextTokenizer | None) -> dict:
        """Return the settings that determine the tokens, for meta.json.

        Later additions are left out while they have their default, so that digests of older folders
        stay valid.

        Args:
            tokenizer: the given tokenizer, or None if one is trained.
        """
        recorded = {
            "vocab_size": self.vocab_size,
            "valid_fraction": self.valid_fraction,
            "seed": self.seed,
            "on_error": self.on_error,
            "tokenizer": tokenizer and tokenizer.fingerprint,
        }
        if self.field != "text":
            recorded["field"] = self.field
        if self.document_bytes is not None:
            recorded["document_bytes"] = self.document_bytes
        if tokenizer is not None and tokenizer.add_bos:
            recorded["add_bos"] = True
        return recorded


def check_settings(
    settings: TokenizeSettings, tokenizer: TextTokenizer | None, tokenizer_name: str | Path | None
) -> None:
    """Raise ValueError if a setting is out of range or conflicts with the given tokenizer.

    Args:
        settings: settings to check.
        tokenizer: the given tokenizer, or None if one is trained.
        tokenizer_name: name of that tokenizer, for messages.
    """
    if tokenizer is None and settings.vocab_size is None:
        raise ValueError("give a vocab_size to train a tokenizer, or a trained tokenizer")
    if tokenizer is None and settings.special_tokens != SpecialTokens():
        raise ValueError(
            "--bos-token, --eos-token and --add-bos need a given tokenizer: name one with "
            "--tokenizer, or leave them out"
        )
    if tokenizer is not None and settings.vocab_size not in (None, tokenizer.vocab_size):
        raise ValueError(
            f"vocab_size = {settings.vocab_size}, but the tokenizer {tokenizer_name} has "
            f"{tokenizer.vocab_size} pieces: leave vocab_size out, or leave the tokenizer out to "
            "train one"
        )
    if not 0 <= settings.valid_fraction < 1:
        raise ValueError(f"valid_fraction = {settings.valid_fraction}: must be in [0, 1)")
    for name, most in (("workers", 4096), ("document_bytes", 2**40), ("vocab_size", 2**24)):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
        if value is not None and value > most:
            raise ValueError(f"{name} = {shown(value)}: must be at most {most:,}")
    ReadOptions(settings.on_error, settings.field)
