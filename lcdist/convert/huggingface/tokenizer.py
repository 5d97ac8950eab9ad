"""The tokenizer's files: copied beside the weights, and refused where they do not fit them."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

JSON, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
# In the order in which they say how many tokens there are; the rest is only copied.
FILES = (
    JSON,
    SENTENCEPIECE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Raise ValueError where a tokenizer in `folder` has tokens that the model has no row for."""
    for name, count in (
        (JSON, _tokens_in_json),
        (SENTENCEPIECE, _tokens_in_model),
        ("added_tokens.json", _tokens_added),
    ):
        if not (folder / name).is_file():
            continue
        found = count(folder / name)
        if found > vocab_size:
            raise ValueError(
                f"{folder / name} has tokens up to number {found - 1}, and the model has "
                f"{vocab_size} (vocab_size): this is not the model's tokenizer"
            )


def copy_tokenizer(folders: Iterable[Path], out: Path) -> list[str]:
    """Copy the files of the first folder that has a tokenizer; their names."""
    for folder in folders:
        if (folder / JSON).is_file() or (folder / SENTENCEPIECE).is_file():
            names = [name for name in FILES if (folder / name).is_file()]
            for name in names:
                shutil.copyfile(folder / name, out / name)
            return names
    return []


def _tokens_in_json(file: Path) -> int:
    table = _table(file)
    model = table.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict | list):
        raise ValueError(f"{file} is no tokenizer: it has no model.vocab")
    # Unigram models list their pieces, the others number them.
    numbers = list(vocab.values()) if isinstance(vocab, dict) else [len(vocab) - 1]
    added = table.get("added_tokens") or []
    return 1 + max([*numbers, *(token["id"] for token in added)], default=-1)


def _tokens_in_model(file: Path) -> int:
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(file.read_bytes())
    except RuntimeError as error:
        raise ValueError(f"{file} is no sentencepiece model: {error}") from error
    return model.get_piece_size()


def _tokens_added(file: Path) -> int:
    return 1 + max(_table(file).values(), default=-1)


def _table(file: Path) -> dict[str, Any]:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{file}: expected a table")
    return table
