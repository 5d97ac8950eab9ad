"""Copy tokenizer files to the folder of the weights, and reject one that does not fit."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

JSON, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
ADDED_TOKENS = "added_tokens.json"
FILES = (
    JSON,
    SENTENCEPIECE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    ADDED_TOKENS,
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Raise ValueError if a tokenizer file in `folder` has a token id of `vocab_size` or more."""
    for name, count in (
        (JSON, _count_json_tokens),
        (SENTENCEPIECE, _count_sentencepiece_tokens),
        (ADDED_TOKENS, _count_added_tokens),
    ):
        if not (folder / name).is_file():
            continue
        num_tokens = count(folder / name)
        if num_tokens > vocab_size:
            raise ValueError(
                f"{folder / name} has token ids up to {num_tokens - 1}, and the model has "
                f"{vocab_size} tokens (vocab_size): this is not the model's tokenizer"
            )


def copy_tokenizer(folders: Iterable[Path], out: Path) -> list[str]:
    """Copy the files of the first folder that has a tokenizer, and return their names."""
    for folder in folders:
        if (folder / JSON).is_file() or (folder / SENTENCEPIECE).is_file():
            names = [name for name in FILES if (folder / name).is_file()]
            for name in names:
                shutil.copyfile(folder / name, out / name)
            return names
    return []


def _count_json_tokens(file: Path) -> int:
    """Return the greatest token id of a tokenizer.json, plus one."""
    table = _read_table(file)
    model = table.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict | list):
        raise ValueError(f"{file} is no tokenizer: it has no model.vocab")
    # Unigram models list their tokens, the others map tokens to ids.
    ids = list(vocab.values()) if isinstance(vocab, dict) else [len(vocab) - 1]
    added = table.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ValueError(f"{file} is no tokenizer: its added_tokens are no list of objects")
    return _next_id(file, [*ids, *(token.get("id") for token in added)])


def _next_id(file: Path, ids: Iterable[Any]) -> int:
    """Return the greatest token id plus one; raise ValueError if one is no whole number."""
    greatest = -1
    for number in ids:
        if type(number) is not int or number < -1:
            raise ValueError(f"{file} is no tokenizer: a token has the id {number!r}")
        greatest = max(greatest, number)
    return greatest + 1


def _count_sentencepiece_tokens(file: Path) -> int:
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(file.read_bytes())
    except (RuntimeError, UnicodeDecodeError) as error:
        # The second is the library's: its own message quotes the damaged bytes.
        raise ValueError(f"{file} is no sentencepiece model: {error}") from error
    return model.get_piece_size()


def _count_added_tokens(file: Path) -> int:
    """Return the greatest token id of an added_tokens.json, plus one."""
    return _next_id(file, _read_table(file).values())


def _read_table(file: Path) -> dict[str, Any]:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return table
