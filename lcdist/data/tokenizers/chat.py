"""Chat templates: where a Hugging Face tokenizer keeps its own, and the tokens of rendered text."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from lcdist.data.tokenizers.files import TextTokenizer
from lcdist.data.tokenizers.huggingface import HuggingFaceTokenizer
from lcdist.utils.json_file import read_json

TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
_REMEDY = "give one with --chat-template FILE"


def read_chat_template(tokenizer: str | Path, file: str | Path | None = None) -> str:
    """Return the chat template in `file`, or else the one of a tokenizer.

    Args:
        tokenizer: a tokenizer.json, or the folder that contains it.
        file: a template in Jinja.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if file is not None:
        return _read_text(Path(file))
    path = Path(tokenizer)
    folder = path if path.is_dir() else path.parent
    if (folder / TEMPLATE_FILE).is_file():
        return _read_text(folder / TEMPLATE_FILE)
    config = folder / _CONFIG_FILE
    table = read_json(config, "correct or remove it") if config.is_file() else {}
    template = table.get("chat_template") if isinstance(table, dict) else None
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
        if template is None:
            names = ", ".join(map(str, named)) or "none"
            raise ValueError(f"{config}: no chat template is named default ({names}); {_REMEDY}")
    if not isinstance(template, str) or not template:
        raise ValueError(
            f"tokenizer {tokenizer}: it has no chat template, neither {TEMPLATE_FILE} nor "
            f"chat_template in {_CONFIG_FILE}; {_REMEDY}"
        )
    return template


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}); {_REMEDY}") from error


def chat_tokenizer(tokenizer: TextTokenizer) -> "ChatTokenizer":
    """Return the tokenizer of rendered conversations; raise ValueError if it has no such tokens."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ValueError(
            f"--conversations: a {tokenizer.kind} tokenizer has no tokens for turns; name a "
            "tokenizer.json, or a model's folder with one, with --tokenizer"
        )
    return ChatTokenizer(tokenizer)


class ChatTokenizer:
    """Tokens of rendered conversations: the texts of special tokens in them are these tokens.

    Attributes:
        names: texts of the tokens that a template may name, such as "eos_token".
        specials: texts of all special tokens.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self.names: Mapping[str, str] = tokenizer.named_tokens
        self._eos_id, self._eos = tokenizer.eos_id, self.names["eos_token"]
        table: dict[str, Any] = json.loads(tokenizer.files["tokenizer.json"])
        # It would add special tokens, and leave white space out of the places of tokens.
        table["post_processor"] = None
        self._model = tokenizers.Tokenizer.from_str(json.dumps(table))
        self._model.no_truncation()
        self._model.no_padding()
        added = self._model.get_added_tokens_decoder().values()
        self.specials = sorted({*(one.content for one in added if one.special), self._eos})

    def encode_prompt(self, text: str) -> list[int]:
        """Return the tokens of a conversation that the model goes on with."""
        return self._model.encode(text, add_special_tokens=False).ids

    def encode(self, text: str, answers: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Return the tokens of a rendered conversation, and which of them belong to an answer.

        A token belongs to an answer if any of its characters does. eos is added where the template
        writes none; it is part of the last answer if the template ends that with no token.

        Args:
            text: the conversation.
            answers: places [start, stop) in it, in order.
        """
        encoded = self._model.encode(text, add_special_tokens=False)
        inside, remaining = [], list(answers)
        for start, stop in encoded.offsets:
            while remaining and remaining[0][1] <= start:
                remaining.pop(0)
            inside.append(bool(remaining) and remaining[0][0] < stop)
        tokens, written = encoded.ids, text.rstrip()
        if not written.endswith(self._eos):
            open_ended = not written.endswith(tuple(self.specials))
            tokens, inside = (
                [*tokens, self._eos_id],
                [*inside, open_ended and answers[-1][1] == len(text)],
            )
        return tokens, inside
