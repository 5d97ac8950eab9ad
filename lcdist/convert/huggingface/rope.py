"""Hugging Face's block on rotary embedding to `[model.rope]` and back.

Read in both of its forms: `rope_theta` beside `rope_scaling` (transformers 4) and `rope_parameters`
(transformers 5). Written in the first, which both read. What neither side has is refused by name.
The formulas on their side are those of `reference`, ours those of `lcdist.model.rotary`.
"""

import math
from collections.abc import Mapping
from typing import Any

from lcdist.config.rope import (
    Rope,
    RopeDynamic,
    RopeLlama3,
    RopeLong,
    RopeNTK,
    RopePI,
    RopePlain,
    RopeYarn,
)

ORIGINAL = "original_max_position_embeddings"
# Beside the type and the base, what each type has: needed first, then what may be left out.
_KEYS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        (),
        ("factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale")
        + ("mscale_all_dim", "truncate"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (ORIGINAL,)),
    "longrope": (("short_factor", "long_factor"), ("factor", ORIGINAL, "attention_factor")),
}
DEFAULT_BASE = 10000.0


def from_hf(table: Mapping[str, Any]) -> Rope:
    """The rotation that a config.json asks for.

    Raises ValueError naming a type or key that is not known, or two that contradict each other.
    """
    block, where = block_of(table)
    kind = type_of(block, where)
    needed, optional = _KEYS[kind]
    given = {key: value for key, value in block.items() if value is not None}
    odd = set(given) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    odd -= {*needed, *optional}
    # transformers writes the original length into blocks that make no use of it.
    odd -= {ORIGINAL} if kind in ("default", "linear") else set()
    if odd:
        raise ValueError(f"config.json: {where}: type '{kind}' has no key {', '.join(sorted(odd))}")
    missing = [key for key in needed if key not in given]
    if missing:
        raise ValueError(f"config.json: {where}: type '{kind}' needs {', '.join(missing)}")
    if given.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"config.json: {where}: partial_rotary_factor = {given['partial_rotary_factor']}: "
            "only whole heads are rotated here"
        )
    for key, value in given.items():
        _check(key, value, where)
    base = float(given.get("rope_theta", DEFAULT_BASE))
    return _MAKERS[kind](given, base, table)


def block_of(table: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The block of a config.json in the form of transformers 5, and the key it was found under."""
    old, new = table.get("rope_scaling"), table.get("rope_parameters")
    if old and new and {**old, "type": None} != {**new, "type": None}:
        raise ValueError("config.json has both rope_scaling and rope_parameters: remove one")
    where = "rope_parameters" if new else "rope_scaling"
    block = new or old or {}
    if not isinstance(block, Mapping):
        raise ValueError(f"config.json: {where} = {block!r}: expected a table")
    if any(isinstance(value, Mapping) for value in block.values()):
        raise ValueError(
            f"config.json: {where} differs from layer to layer, which is not known here"
        )
    block = dict(block)
    if table.get("rope_theta") is not None:
        if block.get("rope_theta", table["rope_theta"]) != table["rope_theta"]:
            raise ValueError(
                f"config.json: rope_theta is {table['rope_theta']} and, in {where}, "
                f"{block['rope_theta']}"
            )
        block["rope_theta"] = table["rope_theta"]
    if ORIGINAL in table and type_of(block, where) in ("yarn", "llama3", "longrope"):
        block[ORIGINAL] = table[ORIGINAL]
    return block, where


def type_of(block: Mapping[str, Any], where: str) -> str:
    """Its type by name. Raises ValueError where it is not known."""
    kind = block.get("rope_type", block.get("type", "default"))
    if kind not in _KEYS:
        raise ValueError(
            f"config.json: {where}: type {kind!r} is not known; known are {', '.join(_KEYS)}"
        )
    return kind


def _check(key: str, value: Any, where: str) -> None:
    if key in ("rope_type", "type", "truncate"):
        return
    numbers = value if isinstance(value, list) else [value]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or number <= 0:
            raise ValueError(f"config.json: {where}: {key} = {value!r}: expected a number above 0")


def _original(given: Mapping[str, Any], table: Mapping[str, Any]) -> int:
    return int(given.get(ORIGINAL, table["max_position_embeddings"]))


def _factor(given: Mapping[str, Any], table: Mapping[str, Any]) -> float:
    """What is written, or else by how much the model's length is more than the original one."""
    stretched = table["max_position_embeddings"] / _original(given, table)
    return float(given.get("factor", max(1.0, stretched)))


def _yarn(given: Mapping[str, Any], base: float, table: Mapping[str, Any]) -> RopeYarn:
    factor, attention_factor = _factor(given, table), given.get("attention_factor")
    if attention_factor is None and "mscale" in given and "mscale_all_dim" in given:
        above, below = (
            0.1 * given[key] * math.log(factor) + 1.0 for key in ("mscale", "mscale_all_dim")
        )
        attention_factor = above / below
    return RopeYarn(
        base=base,
        factor=factor,
        original_seqlen=_original(given, table),
        beta_fast=float(given.get("beta_fast", 32)),
        beta_slow=float(given.get("beta_slow", 1)),
        attention_factor=None if attention_factor is None else float(attention_factor),
        truncate=bool(given.get("truncate", True)),
    )


def _long(given: Mapping[str, Any], base: float, table: Mapping[str, Any]) -> RopeLong:
    factor, original = _factor(given, table), _original(given, table)
    stretched = table["max_position_embeddings"] / original
    if "attention_factor" not in given and "factor" in given and factor != stretched:
        raise ValueError(
            f"config.json: longrope has factor = {factor}, but max_position_embeddings / "
            f"{ORIGINAL} = {stretched}; versions of transformers differ in which they take: set "
            "attention_factor"
        )
    given_factor = given.get("attention_factor")
    return RopeLong(
        base=base,
        factor=factor,
        original_seqlen=original,
        short_factors=tuple(map(float, given["short_factor"])),
        long_factors=tuple(map(float, given["long_factor"])),
        attention_factor=None if given_factor is None else float(given_factor),
    )


def _llama3(given: Mapping[str, Any], base: float, table: Mapping[str, Any]) -> RopeLlama3:
    return RopeLlama3(
        base=base,
        factor=float(given["factor"]),
        low_freq_factor=float(given["low_freq_factor"]),
        high_freq_factor=float(given["high_freq_factor"]),
        original_seqlen=_original(given, table),
    )


def _dynamic(given: Mapping[str, Any], base: float, table: Mapping[str, Any]) -> RopeDynamic:
    original = int(table["max_position_embeddings"])
    return RopeDynamic(base=base, factor=float(given["factor"]), original_seqlen=original)


_MAKERS: Mapping[str, Any] = {
    "default": lambda given, base, table: RopePlain(base=base),
    "linear": lambda given, base, table: RopePI(base=base, factor=float(given["factor"])),
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _long,
}


def to_hf(rope: Rope, head_dim: int, seqlen: int) -> dict[str, Any]:
    """The keys of a config.json for `rope` and a model trained on `seqlen` tokens.

    Its length is that of the training but for two types, where it is part of the formula: for
    `dynamic` it is the original length, and for `yarn` factor times that, which is what some
    versions of transformers make the factor from.
    """
    theta, length = rope.base, seqlen
    top: dict[str, Any] = {}
    block: dict[str, Any] | None = None
    if isinstance(rope, RopeNTK):
        theta = rope.base * rope.factor ** (head_dim / (head_dim - 2))
    elif isinstance(rope, RopePI):
        block = {"rope_type": "linear", "factor": rope.factor}
    elif isinstance(rope, RopeDynamic):
        block, length = {"rope_type": "dynamic", "factor": rope.factor}, rope.original_seqlen
    elif isinstance(rope, RopeLlama3):
        block = {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            ORIGINAL: rope.original_seqlen,
        }
    elif isinstance(rope, RopeYarn):
        block, length = _yarn_block(rope), round(rope.factor * rope.original_seqlen)
    elif isinstance(rope, RopeLong):
        block = _long_block(rope)
        # Versions 4 look for it here.
        top[ORIGINAL] = rope.original_seqlen
    if block is not None:
        block["type"] = block["rope_type"]
    return {"max_position_embeddings": length, "rope_theta": theta, "rope_scaling": block, **top}


def _yarn_block(rope: RopeYarn) -> dict[str, Any]:
    factor = rope.attention_factor
    # False alone is written: versions 4 do not know the key, and round.
    ends = {} if rope.truncate else {"truncate": False}
    return {
        "rope_type": "yarn",
        "factor": rope.factor,
        ORIGINAL: rope.original_seqlen,
        "attention_factor": 0.1 * math.log(rope.factor) + 1.0 if factor is None else factor,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        **ends,
    }


def _long_block(rope: RopeLong) -> dict[str, Any]:
    default = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_seqlen))
    factor = rope.attention_factor
    return {
        "rope_type": "longrope",
        "factor": rope.factor,
        ORIGINAL: rope.original_seqlen,
        "attention_factor": default if factor is None else factor,
        "short_factor": list(rope.short_factors),
        "long_factor": list(rope.long_factors),
    }
