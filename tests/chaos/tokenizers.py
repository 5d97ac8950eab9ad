"""Generate tokenizers: changed bytes of a sentencepiece model, changed keys of a tokenizer.json."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from lcdist.data.tokenizers.files import open_tokenizer
from lcdist.data.tokenizers.sentencepiece_bpe import train_tokenizer
from tests.chaos.inputs import ABSURD, BYTE_CHANGES, Kind, changed
from tests.chaos.tally import REFUSED

MEANING = (
    "it opens, and its tokens of a text are within its vocabulary and have a text; or ValueError "
    "that names the file"
)
TEXT = "def alpha(beta):\n    return 'gamma ▁ é' + beta  # 123\n"
ALPHABET = {chr(code): number for number, code in enumerate(range(33, 127))}
BYTE_LEVEL = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [{"id": 95, "content": "</s>", "single_word": False, "lstrip": False,
                      "rstrip": False, "normalized": False, "special": True}],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", **BYTE_LEVEL},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", **BYTE_LEVEL},
    "model": {"type": "BPE", "vocab": {**ALPHABET, "al": 94}, "merges": ["a l"]},
}  # fmt: skip
PATHS = ["version", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder",
         "model", "model.type", "model.vocab", "model.merges", "model.vocab.a",
         "model.unk_token", "model.byte_fallback", "pre_tokenizer.type", "truncation"]  # fmt: skip
BESIDE = ["tokenizer_config.json", "special_tokens_map.json", "tokenizer_specials.json"]


@st.composite
def tokenizers(draw: st.DrawFn) -> dict[str, Any]:
    """Generate changes of a tokenizer of one of the two formats."""
    if draw(st.integers(0, 2)) == 0:
        flips = st.lists(
            st.tuples(st.just("flip"), st.floats(0, 0.99), st.integers(0, 7)), max_size=2
        )
        return {"kind": "model", "changes": draw(flips)}
    # One change at a time, so that most get as far as encoding a text.
    changed_place = draw(st.sampled_from(["", "keys", "changes", "eos", "other", "beside"]))

    def change(place: str, strategy: st.SearchStrategy, otherwise: Any) -> Any:
        return draw(strategy) if place == changed_place else otherwise

    keys = st.dictionaries(st.sampled_from(PATHS), ABSURD, max_size=2)
    others = st.dictionaries(st.sampled_from(["bos_token", "add_bos"]), ABSURD)
    ends = st.one_of(st.sampled_from(["a", "?", "é"]), ABSURD)
    named = {"eos_token": change("eos", ends, "</s>"), **change("other", others, {})}
    return {
        "kind": "json",
        "keys": change("keys", keys, {}),
        "changes": change("changes", BYTE_CHANGES, []),
        "beside": {draw(st.sampled_from(BESIDE)): named},
        "beside_changes": change("beside", BYTE_CHANGES, []),
    }


@cache
def _trained() -> bytes:
    return train_tokenizer([TEXT * 20], 300)


def write_tokenizer(value: Any, folder: Path) -> Path:
    """Write the files of a tokenizer; return the one to open."""
    if value["kind"] == "model":
        file = folder / "tokenizer.model"
        file.write_bytes(changed(_trained(), value["changes"]))
        return file
    table = json.loads(json.dumps(TOKENIZER))
    for path, entry in value["keys"].items():
        *outer, key = path.split(".")
        node = table
        for part in outer:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node[key] = entry
    for name, content in value["beside"].items():
        text = json.dumps(content).encode()
        (folder / name).write_bytes(changed(text, value["beside_changes"]))
    file = folder / "tokenizer.json"
    file.write_bytes(changed(json.dumps(table).encode(), value["changes"]))
    return file


def attempt(value: Any, folder: Path) -> str | None:
    """Open the tokenizer and use it; return what went wrong."""
    file = write_tokenizer(value, folder)
    try:
        tokenizer = open_tokenizer(file)
    except ValueError as error:
        return REFUSED if str(folder) in str(error) else f"the file is not named: {error}"
    tokens = tokenizer.encode(TEXT)
    if not all(0 <= token < tokenizer.vocab_size for token in (*tokens, tokenizer.eos_id)):
        return f"tokens beyond {tokenizer.vocab_size}: {max(tokens)}, eos {tokenizer.eos_id}"
    tokenizer.decode(tokens)
    return None


TOKENIZERS = Kind("tokenizers", MEANING, 300, tokenizers(), attempt)
