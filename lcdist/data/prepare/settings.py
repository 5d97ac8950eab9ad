"""What tokens depend on besides their text."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from lcdist.data.prepare.chunks import OnError, ReadOptions
from lcdist.data.tokenizers.files import TextTokenizer
from lcdist.data.tokenizers.huggingface import SpecialTokens


@dataclass(frozen=True)
class TokenizeSettings:
    """What a token folder depends on besides its text.

    vocab_size: pieces of the tokenizer (None: as many as the given tokenizer has).
    valid_fraction: share of documents, in [0, 1), that are kept out of training. seed: of the
    split. on_error: "refuse" or "skip" what cannot be read. field: of a record, where its text is.
    document_bytes: about how long a document of plain text may get; None: `PART_BYTES`.
    special_tokens: at the ends of documents. workers: processes; they do not change the result.
    """

    vocab_size: int | None
    valid_fraction: float
    seed: int
    on_error: OnError
    field: str = "text"
    document_bytes: int | None = None
    special_tokens: SpecialTokens = dataclasses.field(default_factory=SpecialTokens)
    workers: int = 1

    def recorded(self, given: TextTokenizer | None) -> dict:
        """What the tokens depend on; what is as it always was is left out."""
        kept = {
            "vocab_size": self.vocab_size,
            "valid_fraction": self.valid_fraction,
            "seed": self.seed,
            "on_error": self.on_error,
            "tokenizer": given and given.fingerprint,
        }
        if self.field != "text":
            kept["field"] = self.field
        if self.document_bytes is not None:
            kept["document_bytes"] = self.document_bytes
        if given is not None and given.begins:
            kept["add_bos"] = True
        return kept


def check_settings(
    settings: TokenizeSettings, given: TextTokenizer | None, tokenizer: str | Path | None
) -> None:
    """Raise ValueError where a setting is out of range, or contradicts the given tokenizer.

    tokenizer: how that was named.
    """
    if given is None and settings.vocab_size is None:
        raise ValueError("give a vocab_size to train a tokenizer, or a trained tokenizer")
    if given is None and settings.special_tokens != SpecialTokens():
        raise ValueError(
            "--bos-token, --eos-token and --add-bos are for a given tokenizer: name one with "
            "--tokenizer, or leave them out"
        )
    if given is not None and settings.vocab_size not in (None, given.vocab_size):
        raise ValueError(
            f"vocab_size = {settings.vocab_size}, but the tokenizer {tokenizer} has "
            f"{given.vocab_size} pieces: leave vocab_size out, or leave the tokenizer out to "
            "train one"
        )
    if not 0 <= settings.valid_fraction < 1:
        raise ValueError(f"valid_fraction = {settings.valid_fraction}: must be in [0, 1)")
    for name in ("workers", "document_bytes"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    ReadOptions(settings.on_error, settings.field)
