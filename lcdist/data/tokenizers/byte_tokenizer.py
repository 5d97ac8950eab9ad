"""Text as its bytes of UTF-8: a tokenizer without a file, for any language and for tests.

Bytes instead of learned pieces, as in ByT5 (arXiv:2105.13626); here the bytes come first.
"""

import hashlib
from collections.abc import Mapping, Sequence

BYTES_FILE = "tokenizer_bytes.json"
_CONTENT = b'{"tokens": "bytes of UTF-8, then end and begin of text"}\n'


class ByteTokenizer:
    """Tokens 0..255 are bytes, 256 ends a document, 257 may begin one."""

    kind = "bytes"
    vocab_size = 258
    eos_id = 256
    bos_id: int | None = 257

    def __init__(self, begins: bool = False) -> None:
        self.begins = begins
        self.fingerprint = hashlib.sha256(_CONTENT).hexdigest()

    @property
    def files(self) -> Mapping[str, bytes]:
        """What a token folder keeps of it."""
        return {BYTES_FILE: _CONTENT}

    def encode(self, text: str) -> list[int]:
        """The token numbers of `text`, no eos. Raises ValueError on a lone surrogate."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`; bytes that are no UTF-8 become U+FFFD.

        Raises ValueError on a number that is no token.
        """
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token {token}: bytes have the numbers 0..{self.vocab_size - 1}")
        return bytes(token for token in tokens if token < 256).decode(errors="replace")
