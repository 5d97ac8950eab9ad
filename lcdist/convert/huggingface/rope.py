"""Convert the rotary embedding of a config.json to `[model.rope]` and back.

Reads both forms: `rope_theta` with `rope_scaling` (transformers 4) and `rope_parameters`
(transformers 5). Writes the first, which both versions read. Unknown types and keys are refused by
name. `lcdist.convert.reference_forward` has Hugging Face's formulas, `lcdist.model.rotary` ours.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any

from lcdist.config import rope as ropes

ORIGINAL_LENGTH = "original_max_position_embeddings"
# Keys of each type besides type and base: (required, optional).
_KEYS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        (),
        ("factor", ORIGINAL_LENGTH, "attention_factor", "beta_fast", "beta_slow", "mscale")
        + ("mscale_all_dim", "truncate"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (ORIGINAL_LENGTH,)),
    "longrope": (("short_factor", "long_factor"), ("factor", ORIGINAL_LENGTH, "attention_factor")),
}
DEFAULT_BASE = 10000.0


def rope_from_hf(table: Mapping[str, Any]) -> ropes.Rope:
    """Return the rotary embedding of a config.json.

    Raises:
        ValueError: naming an unknown type or key, or two keys that contradict each other.
    """
    block, source_key = rope_block(table)
    kind = rope_type(block, source_key)
    required, optional = _KEYS[kind]
    values = {key: value for key, value in block.items() if value is not None}
    unknown = set(values) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    unknown -= {*required, *optional}
    # transformers writes the original length into types that do not use it.
    unknown -= {ORIGINAL_LENGTH} if kind in ("default", "linear") else set()
    if unknown:
        raise ValueError(
            f"config.json: {source_key}: type '{kind}' has no key {', '.join(sorted(unknown))}"
        )
    missing = [key for key in required if key not in values]
    if missing:
        raise ValueError(f"config.json: {source_key}: type '{kind}' needs {', '.join(missing)}")
    if values.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"config.json: {source_key}: partial_rotary_factor = "
            f"{values['partial_rotary_factor']}: lcdist rotates whole heads only"
        )
    for key, value in values.items():
        _check_value(key, value, source_key)
    base = float(values.get("rope_theta", DEFAULT_BASE))
    return _READERS[kind](values, base, table)


def rope_block(table: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return (rotary keys in the form of transformers 5, the key of config.json they come from).

    Raises:
        ValueError: both forms are present and differ, or the rotation differs between layers.
    """
    old, new = table.get("rope_scaling"), table.get("rope_parameters")
    for key, found in (("rope_scaling", old), ("rope_parameters", new)):
        if found and not isinstance(found, Mapping):
            raise ValueError(f"config.json: {key} = {found!r}: expected a table")
    if old and new and {**old, "type": None} != {**new, "type": None}:
        raise ValueError("config.json has both rope_scaling and rope_parameters: remove one")
    source_key = "rope_parameters" if new else "rope_scaling"
    block = new or old or {}
    if any(isinstance(value, Mapping) for value in block.values()):
        raise ValueError(
            f"config.json: {source_key} differs between layers, which lcdist does not support"
        )
    block = dict(block)
    if table.get("rope_theta") is not None:
        if block.get("rope_theta", table["rope_theta"]) != table["rope_theta"]:
            raise ValueError(
                f"config.json: rope_theta is {table['rope_theta']}, but {block['rope_theta']} in "
                f"{source_key}"
            )
        block["rope_theta"] = table["rope_theta"]
    if ORIGINAL_LENGTH in table and rope_type(block, source_key) in ("yarn", "llama3", "longrope"):
        block[ORIGINAL_LENGTH] = table[ORIGINAL_LENGTH]
    return block, source_key


def rope_type(block: Mapping[str, Any], source_key: str) -> str:
    """Return the type name of rotary keys. Raises ValueError if it is unknown."""
    kind = block.get("rope_type", block.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ValueError(
            f"config.json: {source_key}: type {kind!r} is unknown; must be one of "
            f"{', '.join(_KEYS)}"
        )
    return kind


def _check_value(key: str, value: Any, source_key: str) -> None:
    if key in ("rope_type", "type"):
        return
    if key == "truncate":
        legal, expected = isinstance(value, bool), "true or false"
    elif key == ORIGINAL_LENGTH:
        legal, expected = type(value) is int and 0 < value < 2**63, "a whole number above 0"
    elif key in ("short_factor", "long_factor"):
        legal = isinstance(value, list) and all(map(is_positive, value))
        expected = "a list of numbers above 0"
    else:
        legal, expected = is_positive(value), "a number above 0"
    if not legal:
        raise ValueError(f"config.json: {source_key}: {key} = {value!r}: expected {expected}")


def is_positive(value: Any) -> bool:
    """Return whether a value is a number above 0 that a float holds; NaN is not."""
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def _original_length(values: Mapping[str, Any], table: Mapping[str, Any]) -> int:
    return int(values.get(ORIGINAL_LENGTH, table["max_position_embeddings"]))


def _factor(values: Mapping[str, Any], table: Mapping[str, Any]) -> float:
    """Return the key `factor`; by default, model length over original length, at least 1."""
    ratio = table["max_position_embeddings"] / _original_length(values, table)
    return float(values.get("factor", max(1.0, ratio)))


def _yarn(values: Mapping[str, Any], base: float, table: Mapping[str, Any]) -> ropes.RopeYarn:
    factor, attention_factor = _factor(values, table), values.get("attention_factor")
    if attention_factor is None and "mscale" in values and "mscale_all_dim" in values:
        numerator, denominator = (
            0.1 * values[key] * math.log(factor) + 1.0 for key in ("mscale", "mscale_all_dim")
        )
        attention_factor = numerator / denominator
    return ropes.RopeYarn(
        base=base,
        factor=factor,
        original_seqlen=_original_length(values, table),
        beta_fast=float(values.get("beta_fast", 32)),
        beta_slow=float(values.get("beta_slow", 1)),
        attention_factor=None if attention_factor is None else float(attention_factor),
        truncate=bool(values.get("truncate", True)),
    )


def _long(values: Mapping[str, Any], base: float, table: Mapping[str, Any]) -> ropes.RopeLong:
    factor, original = _factor(values, table), _original_length(values, table)
    ratio = table["max_position_embeddings"] / original
    if "attention_factor" not in values and "factor" in values and factor != ratio:
        raise ValueError(
            f"config.json: longrope has factor = {factor}, but max_position_embeddings / "
            f"{ORIGINAL_LENGTH} = {ratio}; transformers versions disagree on which one to use: set "
            "attention_factor"
        )
    attention_factor = values.get("attention_factor")
    return ropes.RopeLong(
        base=base,
        factor=factor,
        original_seqlen=original,
        short_factors=tuple(map(float, values["short_factor"])),
        long_factors=tuple(map(float, values["long_factor"])),
        attention_factor=None if attention_factor is None else float(attention_factor),
    )


def _llama3(values: Mapping[str, Any], base: float, table: Mapping[str, Any]) -> ropes.RopeLlama3:
    return ropes.RopeLlama3(
        base=base,
        factor=float(values["factor"]),
        low_freq_factor=float(values["low_freq_factor"]),
        high_freq_factor=float(values["high_freq_factor"]),
        original_seqlen=_original_length(values, table),
    )


def _dynamic(values: Mapping[str, Any], base: float, table: Mapping[str, Any]) -> ropes.RopeDynamic:
    original = int(table["max_position_embeddings"])
    return ropes.RopeDynamic(base=base, factor=float(values["factor"]), original_seqlen=original)


_READERS: Mapping[str, Any] = {
    "default": lambda values, base, table: ropes.RopePlain(base=base),
    "linear": lambda values, base, table: ropes.RopePI(base=base, factor=float(values["factor"])),
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _long,
}


def rope_to_hf(rope: ropes.Rope, head_dim: int, seqlen: int) -> dict[str, Any]:
    """Return the keys of config.json for `rope` and a model trained on `seqlen` tokens.

    max_position_embeddings is `seqlen`, except for two types whose formula uses it: the original
    length for `dynamic`, and factor times the original length for `yarn`, from which some versions
    of transformers compute the factor.
    """
    theta, length = rope.base, seqlen
    top: dict[str, Any] = {}
    block: dict[str, Any] | None = None
    if isinstance(rope, ropes.RopeNTK):
        theta = rope.base * rope.factor ** (head_dim / (head_dim - 2))
    elif isinstance(rope, ropes.RopePI):
        block = {"rope_type": "linear", "factor": rope.factor}
    elif isinstance(rope, ropes.RopeDynamic):
        block, length = {"rope_type": "dynamic", "factor": rope.factor}, rope.original_seqlen
    elif isinstance(rope, ropes.RopeLlama3):
        block = {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            ORIGINAL_LENGTH: rope.original_seqlen,
        }
    elif isinstance(rope, ropes.RopeYarn):
        block, length = _yarn_block(rope), round(rope.factor * rope.original_seqlen)
    elif isinstance(rope, ropes.RopeLong):
        block = _long_block(rope)
        # transformers 4 looks for it at the top level.
        top[ORIGINAL_LENGTH] = rope.original_seqlen
    if block is not None:
        block["type"] = block["rope_type"]
    return {"max_position_embeddings": length, "rope_theta": theta, "rope_scaling": block, **top}


def _yarn_block(rope: ropes.RopeYarn) -> dict[str, Any]:
    factor = rope.attention_factor
    # Only False is written: transformers 4 ignores the key and truncates.
    truncation = {} if rope.truncate else {"truncate": False}
    return {
        "rope_type": "yarn",
        "factor": rope.factor,
        ORIGINAL_LENGTH: rope.original_seqlen,
        "attention_factor": 0.1 * math.log(rope.factor) + 1.0 if factor is None else factor,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        **truncation,
    }


def _long_block(rope: ropes.RopeLong) -> dict[str, Any]:
    default = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_seqlen))
    factor = rope.attention_factor
    return {
        "rope_type": "longrope",
        "factor": rope.factor,
        ORIGINAL_LENGTH: rope.original_seqlen,
        "attention_factor": default if factor is None else factor,
        "short_factor": list(rope.short_factors),
        "long_factor": list(rope.long_factors),
    }
