"""Byte tokenizer: UTF-8 bytes as tokens, for any language and for tests. It needs no file.

It uses bytes instead of learned pieces, as ByT5 (arXiv:2105.13626); here the bytes are the first
256 tokens.
"""

import hashlib
from collections.abc import Mapping, Sequence

BYTES_FILE = "tokenizer_bytes.json"
_CONTENT = b'{"tokens": "bytes of UTF-8, then end and begin of text"}\n'


class ByteTokenizer:
    """Tokens 0..255 are bytes, 256 ends a document, 257 is bos."""

    kind = "bytes"
    vocab_size = 258
    eos_id = 256
    bos_id: int | None = 257

    def __init__(self, add_bos: bool = False) -> None:
        self.add_bos = add_bos
        self.fingerprint = hashlib.sha256(_CONTENT).hexdigest()

    @property
    def files(self) -> Mapping[str, bytes]:
        """Files that a token folder keeps, by name."""
        return {BYTES_FILE: _CONTENT}

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text` without eos. Raises ValueError on a lone surrogate."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: a number is not a token.
        """
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token {token}: byte tokens are 0..{self.vocab_size - 1}")
        return bytes(token for token in tokens if token < 256).decode(errors="replace")
