"""Tokenizers in Hugging Face's format: a tokenizer.json, and files beside it that name its ends.

tokenizer.json alone does not say which token ends a text: tokenizer_config.json or
special_tokens_map.json beside it do, or the user does.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

HF_FILE = "tokenizer.json"
# Written into token folders: what was decided about the tokens that stand at the ends.
SPECIALS_FILE = "tokenizer_specials.json"
# In the order they are asked; the first that names a token wins.
_BESIDE = (SPECIALS_FILE, "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class SpecialTokens:
    """Tokens, as text, that begin and end a document; None: as the tokenizer's files say.

    add_bos: whether documents begin with one; None: where the tokenizer itself would add it.
    """

    bos: str | None = None
    eos: str | None = None
    add_bos: bool | None = None


class HuggingFaceTokenizer:
    """A tokenizer.json, by the `tokenizers` library.

    Raises ValueError where the file is missing or no tokenizer, where nothing says which token
    ends a text, or where a named token is not in its vocabulary.
    """

    kind = "huggingface"

    def __init__(self, path: str | Path, specials: SpecialTokens | None = None) -> None:
        self._path = Path(path)
        if not self._path.is_file():
            raise ValueError(f"tokenizer {path}: no such file; give a tokenizer.json")
        self._content = self._path.read_bytes()
        try:
            self._model = tokenizers.Tokenizer.from_str(self._content.decode())
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"tokenizer {path}: not a tokenizer.json ({error})") from error
        # Otherwise a limit in the file would cut documents, and "</s>" in a text would end one.
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        # Numbers may have holes: what counts is how many rows an embedding needs.
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        asked = specials or SpecialTokens()
        beside = [(name, _table(self._path.with_name(name))) for name in _BESIDE]
        bos, eos = (
            next(filter(None, (_named(table.get(key)) for _, table in beside)), None)
            for key in ("bos_token", "eos_token")
        )
        self._bos, self._eos = asked.bos or bos, asked.eos or eos
        self.eos_id: int = self._end(vocabulary)
        self.bos_id: int | None = self._number(vocabulary, self._bos, "bos")
        kept = beside[0][1].get("add_bos")
        self.begins: bool = self._begins(asked.add_bos if asked.add_bos is not None else kept)
        whole = hashlib.sha256(self._content)
        whole.update(self.files[SPECIALS_FILE])
        self.fingerprint: str = whole.hexdigest()

    @property
    def files(self) -> Mapping[str, bytes]:
        """What a token folder keeps of it."""
        table = {"bos_token": self._bos, "eos_token": self._eos, "add_bos": self.begins}
        return {
            HF_FILE: self._content,
            SPECIALS_FILE: (json.dumps(table, sort_keys=True) + "\n").encode(),
        }

    def encode(self, text: str) -> list[int]:
        """The token numbers of `text`, no bos and no eos. Raises ValueError on a lone surrogate."""
        text.encode()
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`; special ones have none. Raises ValueError on an unknown number."""
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token {token}: this tokenizer has the numbers 0..{self.vocab_size - 1}"
                )
        return self._model.decode([int(token) for token in tokens], skip_special_tokens=True)

    def _end(self, vocabulary: Mapping[str, int]) -> int:
        number = self._number(vocabulary, self._eos, "eos")
        if number is None:
            added = self._model.get_added_tokens_decoder()
            listed = ", ".join(token.content for token in list(added.values())[:8]) or "none"
            raise ValueError(
                f"tokenizer {self._path}: nothing says which token ends a text: no eos_token in "
                f"tokenizer_config.json or special_tokens_map.json beside it; name it with "
                f"--eos-token (its special tokens: {listed})"
            )
        return number

    def _number(self, vocabulary: Mapping[str, int], token: str | None, name: str) -> int | None:
        if token is None:
            return None
        if token not in vocabulary:
            raise ValueError(
                f"tokenizer {self._path}: its {name} token {token!r} is not in its vocabulary; "
                f"name another with --{name}-token"
            )
        return vocabulary[token]

    def _begins(self, asked: bool | None) -> bool:
        """Whether documents begin with bos: as asked, or as the tokenizer's own template does."""
        if asked is None:
            return self.bos_id is not None and self.bos_id in self._model.encode("").ids[:1]
        if asked and self.bos_id is None:
            raise ValueError(
                f"tokenizer {self._path}: nothing says which token begins a text; name it with "
                "--bos-token, or leave --add-bos out"
            )
        return asked


def _table(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); mend it or take it away") from error
    return table if isinstance(table, dict) else {}


def _named(token: Any) -> str | None:
    """The text of a token that is written as itself or as a table with its `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
