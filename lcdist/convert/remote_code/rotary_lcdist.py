"""Rotary embedding of models trained by lcdist, in plain torch.

Exported models carry a copy of this file, so it imports only torch.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def rotation(
    rope: Mapping[str, Any], width: int, context: int, seqlen: int
) -> Callable[..., Tensor]:
    """Return the rotary embedding (arXiv:2104.09864) for a text of `seqlen` tokens.

    Args:
        rope: "rope_type", "rope_theta" and the keys of the type, as in transformers.
        width: width of a head.
        context: max_position_embeddings of the model.
        seqlen: length of the text in tokens.
    """
    theta, factor = frequencies(rope, width, context, seqlen)

    def rotate(x: Tensor, positions: Tensor | None = None) -> Tensor:
        positions = torch.arange(x.shape[1]) if positions is None else positions
        angles = positions.double()[:, None, None] * theta  # [s, 1, d / 2]
        cos, sin = ((y * factor).to(x) for y in (angles.cos(), angles.sin()))
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    return rotate


def frequencies(
    rope: Mapping[str, Any], width: int, context: int, seqlen: int
) -> tuple[Tensor, float]:
    """Return (radians per token, float64 `[width / 2]`; factor of cos and sin)."""
    kind = rope.get("rope_type", "default")
    base, factor = float(rope["rope_theta"]), rope.get("factor") or 1.0
    original = rope.get("original_max_position_embeddings") or context
    if kind == "dynamic" and seqlen > context:
        base *= (factor * seqlen / context - (factor - 1)) ** (width / (width - 2))
    theta = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    if kind == "linear":
        return theta / factor, 1.0
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((original * theta / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return theta / factor * (1 - kept) + theta * kept, 1.0
    if kind == "yarn":
        low, high = (
            width * math.log(original / (rope[key] * 2 * math.pi)) / (2 * math.log(base))
            for key in ("beta_fast", "beta_slow")
        )
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high += 0.001 if low == high else 0
        ramp = ((torch.arange(width // 2).double() - low) / (high - low)).clamp(0, 1)
        return theta * (1 - ramp) + theta / factor * ramp, rope["attention_factor"]
    if kind == "longrope":
        divisors = rope["long_factor" if seqlen > original else "short_factor"]
        return theta / torch.tensor(divisors, dtype=torch.float64), rope["attention_factor"]
    if kind not in ("default", "dynamic"):
        raise ValueError(f"rope_type {kind!r} is unknown to this model")
    return theta, 1.0
