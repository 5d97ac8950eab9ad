"""Settings of tokenization, and their checks."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from lcdist.config.values import shown
from lcdist.data.prepare.chunks import OnError, ReadOptions
from lcdist.data.prepare.conversations import ChatTemplate, compile_template
from lcdist.data.tokenizers.chat import chat_tokenizer
from lcdist.data.tokenizers.files import TextTokenizer
from lcdist.data.tokenizers.huggingface import SpecialTokens

TEXT_FIELD = "text"


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
        chat_template: what records, which then are conversations, are rendered with; None: records
            hold text.
        workers: number of processes; does not change the result.
    """

    vocab_size: int | None
    valid_fraction: float
    seed: int
    on_error: OnError
    field: str = TEXT_FIELD
    document_bytes: int | None = None
    special_tokens: SpecialTokens = dataclasses.field(default_factory=SpecialTokens)
    chat_template: str | None = None
    workers: int = 1

    def chat(self, tokenizer: TextTokenizer | None) -> ChatTemplate | None:
        """Return what reads conversations; None: records hold text."""
        if self.chat_template is None or tokenizer is None:
            return None
        chat = chat_tokenizer(tokenizer)
        field = "" if self.field == TEXT_FIELD else self.field
        return ChatTemplate(self.chat_template, chat.names, chat.specials, field)

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
        if self.field != TEXT_FIELD:
            recorded["field"] = self.field
        if self.document_bytes is not None:
            recorded["document_bytes"] = self.document_bytes
        if tokenizer is not None and tokenizer.add_bos:
            recorded["add_bos"] = True
        chat = self.chat(tokenizer)
        if chat is not None:
            inputs = json.dumps([chat.source, chat.tokens], sort_keys=True)
            recorded["chat_template"] = hashlib.sha256(inputs.encode()).hexdigest()
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
    if settings.chat_template is not None:
        _check_chat(settings, tokenizer)
    if tokenizer is not None and settings.vocab_size not in (None, tokenizer.vocab_size):
        raise ValueError(
            f"--vocab-size {settings.vocab_size}: the tokenizer {tokenizer_name} has "
            f"{tokenizer.vocab_size} pieces; leave --vocab-size out, or leave --tokenizer out to "
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


def _check_chat(settings: TokenizeSettings, tokenizer: TextTokenizer | None) -> None:
    """Raise ValueError if conversations cannot be rendered or tokenized."""
    if tokenizer is None:
        raise ValueError("--conversations needs a tokenizer with a chat template: name --tokenizer")
    if settings.special_tokens.add_bos:
        raise ValueError(
            "--add-bos: the chat template says where bos stands in a conversation; leave it out"
        )
    chat_tokenizer(tokenizer)
    try:
        compile_template(settings.chat_template or "")
    except ValueError as error:
        raise ValueError(f"the chat template is not Jinja: {error}; correct it") from error
