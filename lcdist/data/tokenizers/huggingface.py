"""Tokenizers in Hugging Face's format: a tokenizer.json with files beside it.

tokenizer.json alone does not say which token ends a text. tokenizer_config.json or
special_tokens_map.json beside it name the token, or the user does.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from lcdist.utils.json_file import read_json

HF_FILE = "tokenizer.json"
# Written to token folders: the resolved bos, eos and add_bos.
SPECIAL_TOKENS_FILE = "tokenizer_specials.json"
# Files that may name a special token, in order of priority.
_CONFIG_FILES = (SPECIAL_TOKENS_FILE, "tokenizer_config.json", "special_tokens_map.json")

# Tokens beside bos and eos that a chat template may name.
_NAMED = ("unk", "pad", "sep", "cls", "mask")


@dataclass(frozen=True)
class SpecialTokens:
    """Requested tokens at the ends of documents; None uses what the tokenizer's files say.

    Attributes:
        bos: text of the token that begins a document.
        eos: text of the token that ends a document.
        add_bos: whether documents begin with bos. None: if the tokenizer's template adds it.
    """

    bos: str | None = None
    eos: str | None = None
    add_bos: bool | None = None


class HuggingFaceTokenizer:
    """A tokenizer.json, opened with the `tokenizers` library.

    Raises:
        ValueError: the file is missing or not a tokenizer, no file names the token that ends a
            text, or a named token is not in the vocabulary.
    """

    kind = "huggingface"

    def __init__(self, path: str | Path, special_tokens: SpecialTokens | None = None) -> None:
        self._path = Path(path)
        if not self._path.is_file():
            raise ValueError(f"tokenizer {path}: no such file; give a tokenizer.json")
        self._content = self._path.read_bytes()
        try:
            self._model = tokenizers.Tokenizer.from_str(self._content.decode())
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"tokenizer {path}: not a tokenizer.json ({error})") from error
        # A length limit in the file would cut documents, and "</s>" in a text would end one.
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        # Token numbers may have gaps: vocab_size is the number of rows that an embedding needs.
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        requested = special_tokens or SpecialTokens()
        configs = [_read_json(self._path.with_name(name)) for name in _CONFIG_FILES]
        self._configs = configs
        self._bos = requested.bos or _first_token(configs, "bos_token")
        self._eos = requested.eos or _first_token(configs, "eos_token")
        self.eos_id: int = self._require_eos(vocabulary)
        self.bos_id: int | None = self._token_id(vocabulary, self._bos, "bos")
        recorded = configs[0].get("add_bos")
        if not isinstance(recorded, bool):
            recorded = None
        add_bos = recorded if requested.add_bos is None else requested.add_bos
        self.add_bos: bool = self._resolve_add_bos(add_bos)
        content_hash = hashlib.sha256(self._content)
        content_hash.update(self.files[SPECIAL_TOKENS_FILE])
        self.fingerprint: str = content_hash.hexdigest()

    @property
    def files(self) -> Mapping[str, bytes]:
        """Files that a token folder keeps, by name."""
        table = {"bos_token": self._bos, "eos_token": self._eos, "add_bos": self.add_bos}
        return {
            HF_FILE: self._content,
            SPECIAL_TOKENS_FILE: (json.dumps(table, sort_keys=True) + "\n").encode(),
        }

    @property
    def named_tokens(self) -> dict[str, str]:
        """Texts of the tokens that have a name, such as "eos_token", by it."""
        named = {f"{name}_token": _first_token(self._configs, f"{name}_token") for name in _NAMED}
        named |= {"bos_token": self._bos, "eos_token": self._eos}
        return {name: text for name, text in named.items() if text is not None}

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text` without bos and eos.

        Raises:
            ValueError: the text contains a lone surrogate.
        """
        text.encode()
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`; special tokens have none.

        Raises:
            ValueError: a number is not a token.
        """
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token {token}: the tokens of this tokenizer are 0..{self.vocab_size - 1}"
                )
        return self._model.decode([int(token) for token in tokens], skip_special_tokens=True)

    def _require_eos(self, vocabulary: Mapping[str, int]) -> int:
        number = self._token_id(vocabulary, self._eos, "eos")
        if number is None:
            added = self._model.get_added_tokens_decoder()
            listed = ", ".join(token.content for token in list(added.values())[:8]) or "none"
            raise ValueError(
                f"tokenizer {self._path}: nothing says which token ends a text: no eos_token in "
                f"tokenizer_config.json or special_tokens_map.json beside it; name it with "
                f"--eos-token (its special tokens: {listed})"
            )
        return number

    def _token_id(self, vocabulary: Mapping[str, int], token: str | None, name: str) -> int | None:
        if token is None:
            return None
        if token not in vocabulary:
            raise ValueError(
                f"tokenizer {self._path}: its {name} token {token!r} is not in its vocabulary; "
                f"name another with --{name}-token"
            )
        return vocabulary[token]

    def _resolve_add_bos(self, requested: bool | None) -> bool:
        """Return whether documents begin with bos; None follows the tokenizer's own template."""
        if requested is None:
            return self.bos_id is not None and self.bos_id in self._model.encode("").ids[:1]
        if requested and self.bos_id is None:
            raise ValueError(
                f"tokenizer {self._path}: nothing says which token begins a text; name it with "
                "--bos-token, or leave --add-bos out"
            )
        return requested


def _read_json(path: Path) -> Mapping[str, Any]:
    """Return the object in a JSON file; {} if the file is missing or holds no object."""
    if not path.is_file():
        return {}
    table = read_json(path, "correct or remove it")
    return table if isinstance(table, dict) else {}


def _first_token(configs: Sequence[Mapping[str, Any]], key: str) -> str | None:
    """Return the text of the token that the first config with a token names under `key`.

    A token is written as its text, or as an object with the text under "content".
    """
    for config in configs:
        token = config.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text:
            return text
    return None
