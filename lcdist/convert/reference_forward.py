"""Reference forward pass of a Hugging Face folder: plain torch, tensor by tensor, in float64.

Every conversion compares it with `lcdist.convert.streamed_forward`. It is independent of our tensor
layout: it reads Hugging Face's names, and computes rotary frequencies from config.json with its own
formulas (RoFormer, arXiv:2104.09864; PI, arXiv:2306.15595; YaRN, arXiv:2309.00071; LongRoPE,
arXiv:2402.13753) for the length of the input. Custom attention is computed by the files
that an export carries. No large tensor is held whole.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcdist.convert.huggingface.names import HF_EMBEDDING, HF_FINAL_NORM, HF_OUTPUT, hf_prefix
from lcdist.convert.huggingface.rope import (
    DEFAULT_BASE,
    ORIGINAL_LENGTH,
    rope_block,
    rope_type,
)
from lcdist.convert.huggingface.weights import Weights
from lcdist.convert.remote_files import load_remote_attention, load_remote_rotary

# Elements of one weight that are read at a time.
CHUNK_ELEMENTS = 2**20


def hf_logits(
    table: Mapping[str, Any],
    weights: Weights,
    tokens: Tensor,
    layers: Sequence[Mapping[str, Any]] = (),
) -> Tensor:
    """Compute logits float64 `[s, vocab_size]`, reading every weight from disk.

    Args:
        table: content of config.json; interpreted here independently of `huggingface.config`.
        weights: the folder's weights.
        tokens: int64 `[s]`, landmarks included.
        layers: method and options of each layer; empty means a plain LLaMA.
    """
    eps, width = table.get("rms_norm_eps", 1e-6), _width(table)
    x = torch.stack([weights.rows(HF_EMBEDDING, t, t + 1)[0] for t in tokens.tolist()]).double()
    cos, sin = _rotation(table, width, len(tokens))

    def linear(name: str, x: Tensor) -> Tensor:
        weight, bias = f"{name}.weight", f"{name}.bias"
        out = matmul_by_rows(x, lambda a, b: weights.rows(weight, a, b), weights.shape(weight)[0])
        return out + weights.rows(bias) if bias in weights.entries else out

    def norm(name: str, x: Tensor) -> Tensor:
        scale = weights.rows(name).double()
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * scale

    def heads(name: str, x: Tensor) -> Tensor:
        out = linear(f"{name}_proj", x).unflatten(-1, (-1, width))  # [s, heads, d]
        return norm(f"{name}_norm.weight", out) if f"{name}_norm.weight" in weights.entries else out

    for layer in range(table["num_hidden_layers"]):
        prefix = hf_prefix(layer)
        normed = norm(f"{prefix}input_layernorm.weight", x)
        names = f"{prefix}self_attn."
        q, k, v = (heads(f"{names}{one}", normed) for one in "qkv")
        if layers and (layers[layer]["method"] != "full" or layers[layer]["length_scale"]):
            bias = weights.rows(f"{names}branch_bias") if layers[layer].get("modes") else None
            out = _custom_attention(table, (q, k, v), layers[layer], bias)
        else:
            out = _full_attention(q, k, v, (cos, sin))
        x = x + linear(f"{names}o_proj", out)
        normed = norm(f"{prefix}post_attention_layernorm.weight", x)
        gate = F.silu(linear(f"{prefix}mlp.gate_proj", normed))
        x = x + linear(f"{prefix}mlp.down_proj", gate * linear(f"{prefix}mlp.up_proj", normed))
    head = HF_EMBEDDING if table.get("tie_word_embeddings") else HF_OUTPUT
    return matmul_by_rows(
        norm(HF_FINAL_NORM, x), lambda a, b: weights.rows(head, a, b), table["vocab_size"]
    )


def matmul_by_rows(x: Tensor, rows: Callable[[int, int], Tensor], count: int) -> Tensor:
    """Return x `[s, n]` times the transpose of a weight `[count, n]`, in float64.

    rows(first, stop) returns rows of the weight; some are read at a time.
    """
    out = x.new_empty(len(x), count)
    step = max(1, CHUNK_ELEMENTS // x.shape[-1])
    for first in range(0, count, step):
        stop = min(first + step, count)
        torch.mm(x, rows(first, stop).to(x).T, out=out[:, first:stop])
    return out


def _full_attention(q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Compute causal attention of q, k and v `[s, heads, d]`; neighbouring queries share a key."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [heads, s, d]
    q, k = _rotate(q, *rotation), _rotate(k, *rotation)
    group, seqlen, width = len(q) // len(k), q.shape[1], q.shape[2]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.transpose(1, 2) / math.sqrt(width)
    future = torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1)
    out = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    return out.transpose(0, 1).flatten(1)


def _custom_attention(
    table: Mapping[str, Any],
    qkv: tuple[Tensor, Tensor, Tensor],
    layer: Mapping[str, Any],
    bias: Tensor | None,
) -> Tensor:
    """Compute attention of q, k and v `[s, heads, d]` with the exported file.

    Args:
        table: content of config.json.
        qkv: queries, keys and values.
        layer: method and options.
        bias: that the method has learned.
    """
    q, k, v = (x[None] for x in qkv)
    rotate = load_remote_rotary().rotation(
        rope_block(table)[0], _width(table), table["max_position_embeddings"], q.shape[1]
    )
    return load_remote_attention().attend(layer, (q, k, v), rotate, bias)[0].flatten(1)


def _width(table: Mapping[str, Any]) -> int:
    return table.get("head_dim") or table["hidden_size"] // table["num_attention_heads"]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs half a head apart: (a, b) to (a cos - b sin, b cos + a sin)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _rotation(table: Mapping[str, Any], width: int, seqlen: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin float64 `[s, width / 2]`, multiplied by the attention factor."""
    theta, factor = hf_frequencies(table, width, seqlen)
    angles = torch.arange(seqlen, dtype=torch.float64)[:, None] * theta
    return angles.cos() * factor, angles.sin() * factor


def hf_frequencies(table: Mapping[str, Any], width: int, seqlen: int) -> tuple[Tensor, float]:
    """Return (theta float64 `[width / 2]`, factor of cos and sin) of a config.json.

    seqlen: length of the input in tokens, which some types depend on.
    """
    block, source_key = rope_block(table)
    kind, context = rope_type(block, source_key), table["max_position_embeddings"]
    base = block.get("rope_theta") or DEFAULT_BASE
    if kind == "dynamic":
        stretch = max(seqlen, context) / context
        base *= (block["factor"] * stretch - block["factor"] + 1) ** (width / (width - 2))
    theta = torch.tensor([1 / base ** (i / width) for i in range(0, width, 2)], dtype=torch.float64)
    original = block.get(ORIGINAL_LENGTH) or context
    if kind == "linear":
        return theta / block["factor"], 1.0
    if kind == "llama3":
        return _llama3(block, theta, original), 1.0
    factor = block.get("factor") or context / original
    if kind == "yarn":
        return _yarn(block, theta, (base, factor, original))
    if kind == "longrope":
        divisors = block["long_factor" if seqlen > original else "short_factor"]
        scale = block.get("attention_factor")
        if scale is None:
            scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return theta / torch.tensor(divisors, dtype=torch.float64), scale
    return theta, 1.0


def _llama3(block: Mapping[str, Any], theta: Tensor, original: int) -> Tensor:
    """Scale by wavelength: keep short ones, divide long ones by factor, blend between."""
    low, high, factor = block["low_freq_factor"], block["high_freq_factor"], block["factor"]
    scaled = []
    for one in theta.tolist():
        wavelength = 2 * math.pi / one
        if wavelength < original / high:
            scaled.append(one)
        elif wavelength > original / low:
            scaled.append(one / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * one / factor + smooth * one)
    return torch.tensor(scaled, dtype=torch.float64)


def _yarn(
    block: Mapping[str, Any], theta: Tensor, sizes: tuple[float, float, int]
) -> tuple[Tensor, float]:
    """Scale with a ramp over the feature index, from fast to slow rotation.

    sizes: (base, factor, original length).
    """
    base, factor, original = sizes
    width = 2 * len(theta)
    ends = [
        width
        * math.log(original / (2 * math.pi * (block.get(key) or default)))
        / math.log(base)
        / 2
        for key, default in (("beta_fast", 32), ("beta_slow", 1))
    ]
    if block.get("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], width - 1)
    last += 0.001 if first == last else 0
    scaled = []
    for i, one in enumerate(theta.tolist()):
        slow = min(max((i - first) / (last - first), 0), 1)
        scaled.append(slow * one / factor + (1 - slow) * one)
    scale, keys = block.get("attention_factor"), ("mscale", "mscale_all_dim")
    if scale is None:
        numerator, denominator = (block.get(key) for key in keys)
        numerator, denominator = (numerator, denominator) if numerator and denominator else (1, 0)
        scale = (0.1 * numerator * math.log(factor) + 1) / (
            0.1 * denominator * math.log(factor) + 1
        )
    return torch.tensor(scaled, dtype=torch.float64), scale
