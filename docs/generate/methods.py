"""Make the chooser of methods: what each computes, sends and keeps, and where it is faster."""

from functools import cache

import torch

from docs.generate.rows import PRESETS, Preset, faster_from
from docs.generate.tables import markdown_table
from lcdist.attention import METHODS, HeadSlice
from lcdist.attention.cache import CacheSpec, NewTokens
from lcdist.attention.registry import BUILT_IN
from lcdist.attention.table import method_table
from lcdist.config import parse
from lcdist.hardware.gpu_specs import GPU_SPECS
from lcdist.plan import Plan, make_plan

# The attention of Llama-3.1-8B; vocabulary, MLP and steps change nothing here.
MODEL = {
    **{"vocab_size": 128256, "num_layers": 1, "hidden_size": 4096, "ffn_hidden_size": 14336},
    **{"nheads": 32, "nheads_kv": 8},
}
LENGTHS = (32768, 131072)
CP_RANKS = 8
# The cache is measured by its growth, as what is open of a text does not grow with it. As many
# query heads a key head as in the model.
CACHED_TOKENS = 2048
CACHED_HEADS, CACHED_KEY_HEADS, CACHED_DIM = 4, 1, 16
HEAD = (
    "method",
    *(f"operations at {length:,}" for length in LENGTHS),
    f"bytes sent at {LENGTHS[-1]:,}",
    "cache",
    "faster than dense from",
)


def chooser() -> str:
    """Return the table of costs, each as a multiple of full attention's."""
    full = PRESETS[0]
    rows = []
    for number, preset in enumerate(PRESETS):
        operations = [_share(_operations(preset, n), _operations(full, n)) for n in LENGTHS]
        sent = _share(_sent_bytes(preset), _sent_bytes(full))
        kept = _share(cached_bytes(number), cached_bytes(0))
        rows.append((preset.label, *operations, sent, kept, faster_from(preset)))
    return markdown_table(HEAD, rows, numbers=range(1, len(HEAD) - 1))


def facts_table() -> str:
    """Return the table of the methods' facts, as `lcdist methods` prints it."""
    return method_table(BUILT_IN)


def _share(value: float, of: float) -> str:
    return f"{value / of:.2f}" if value / of >= 0.1 else f"{value / of:.3f}"


@cache
def _plan(preset_number: int, seqlen: int, cp_size: int) -> Plan:
    preset = PRESETS[preset_number]
    table = {
        "model": MODEL,
        "train": {"seqlen": seqlen, "steps": 1, "dtype": "bf16"},
        "log": {"folder": "runs/plan"},
        "data": {"source": "synthetic"},
        "attention": {"method": preset.method, **preset.options},
        "parallel": {"cp_size": cp_size},
    }
    return make_plan(parse(table), cp_size, GPU_SPECS["h100"])


def _operations(preset: Preset, seqlen: int) -> float:
    return _plan(PRESETS.index(preset), seqlen, 1).compute.attention_flops_per_token


def _sent_bytes(preset: Preset) -> int:
    return sum(_plan(PRESETS.index(preset), LENGTHS[-1], CP_RANKS).traffic.exchange_bytes)


@cache
def cached_bytes(number: int) -> int:
    """Return by how many bytes a layer's decoding cache grows if a text is twice as long.

    A method whose weights full attention can read is read densely, as `lcdist generate` does.

    Args:
        number: Of the preset in `PRESETS`.
    """
    is_dense = "dense" in METHODS[PRESETS[number].method].supports
    short, long = (_cache(0 if is_dense else number, n) for n in (CACHED_TOKENS, 2 * CACHED_TOKENS))
    return long - short


@cache
def _cache(number: int, tokens: int) -> int:
    """Return the bytes of a layer's decoding cache that has read a text."""
    method = METHODS[PRESETS[number].method]
    options = _plan(number, LENGTHS[0], 1).layers[0].options
    spec = CacheSpec(
        options=options,
        rotary=None,
        softmax_scale=method.default_scale(CACHED_DIM),
        params=method.initial(options, CACHED_HEADS) or None,
        heads=HeadSlice(0, CACHED_HEADS, 0, CACHED_KEY_HEADS),
        group=None,
        impl="torch",
        rows=1,
        capacity=tokens,
    )
    assert method.make_cache is not None, f"{method.name} has no cache of its own"
    layer = method.make_cache(spec)
    sizes = (CACHED_HEADS, CACHED_KEY_HEADS, CACHED_KEY_HEADS)
    q, k, v = (torch.zeros(1, tokens, n, CACHED_DIM, dtype=torch.bfloat16) for n in sizes)
    with torch.no_grad():
        layer.attend(q, k, v, NewTokens((0,), (0,), tokens))
    return layer.nbytes
