"""Shifted cross chunk attention and related patterns under context parallelism (arXiv:2312.07305).

    out_i = sum_j softmax_j(softmax_scale * q_i . k_j) v_j

over the keys j <= i of i's document that the head's rule selects. `lcdist_kernels.scca` defines the
rules; `pattern.py` assigns them to heads. The exchange follows the rule: windows of chunks `shift`
the intervals they need, pairs of residues `swap` (head, residue) units, and residues of keys
`ring` those keys.
"""

from math import isqrt

import torch
from torch import Tensor

from lcdist.attention.context import AttentionContext
from lcdist.attention.facts import ContextFunctions, out_and_lse
from lcdist.attention.interface import AttentionMethod
from lcdist.attention.scca.cache import PatternCache
from lcdist.attention.scca.pattern import check_documents, for_layer, held_rules, model_rules
from lcdist.attention.scca.ring import (
    RingKeys,
    make_key_ring_plan,
    reference_keys,
    ring_key_bytes,
)
from lcdist.attention.scca.shift import (
    ShiftedWindows,
    make_window_plan,
    reference_windows,
    shift_bytes,
)
from lcdist.attention.scca.swap import (
    SwappedUnits,
    UnitSwap,
    reference_units,
    swap_bytes,
    unit_bytes,
)
from lcdist.attention.scca.units import UnitLayout, dilated_heads
from lcdist.attention.shape import HeadSlice, Shape, Traffic
from lcdist.config.schema import SccaOptions
from lcdist.exchange import Pending
from lcdist.layout import ContextLayout
from lcdist_kernels import scca_attention, scca_reference
from lcdist_kernels.full import TORCH_IMPL, AttentionImpl, select_impl
from lcdist_kernels.scca import IMPLS, Rule
from lcdist_kernels.tape import KeptPass, replays

LAYOUTS = ("contiguous", "zigzag")


def attend(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return this rank's shard of the output, with the exchanges of its heads' rules."""
    rules = _training_rules(q, ctx)
    _check_layout(ctx.layout)
    dense = ctx.impl == "reference"
    what = "scca attention under context parallelism"
    block_impl = TORCH_IMPL if dense else select_impl(ctx.impl, q, what)
    q, k = ctx.rotate(q), ctx.rotate(k)
    if rules[0].kind == "key":
        return _attend_keys(q, k, v, rules, block_impl, ctx)
    pending = _post_units(q, k, v, rules, block_impl, ctx)
    # Outputs by the number of their first head.
    outputs: dict[int, Tensor] = {}
    if any(rule.is_window for rule in rules):
        out = _attend_windows(q, k, v, rules, block_impl, ctx)
        if not pending:
            return out
        outputs = {i: out[:, :, i : i + 1] for i, rule in enumerate(rules) if rule.is_window}
    exchanges, queries, sent = zip(*pending, strict=True)
    if dense:
        made = [reference_units(*each) for each in zip(exchanges, sent, strict=True)]
    else:
        made = SwappedUnits.apply(k, v, exchanges, sent, *queries)
    outputs |= {x.units.heads.first: out for x, out in zip(exchanges, made, strict=True)}
    return torch.cat([outputs[first] for first in sorted(outputs)], 2)


def _attend_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: tuple[Rule, ...],
    block_impl: AttentionImpl,
    ctx: AttentionContext,
) -> Tensor:
    plan = make_key_ring_plan(rules, k.shape[2], ctx.layout_key, ctx.documents, k.device)
    grouped = q.unflatten(2, (k.shape[2], -1))
    if ctx.impl == "reference":
        return reference_keys(grouped, k, v, plan, ctx).flatten(2, 3).to(q.dtype)
    return KeptPass.apply(RingKeys(plan, block_impl, ctx), grouped, k, v).flatten(2, 3)


def _attend_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: tuple[Rule, ...],
    block_impl: AttentionImpl,
    ctx: AttentionContext,
) -> Tensor:
    plan = make_window_plan(rules, k.shape[2], ctx.layout_key, ctx.documents, block_impl)
    grouped = q.unflatten(2, (k.shape[2], -1))
    if ctx.impl == "reference":
        return reference_windows(grouped, k, v, plan, ctx).flatten(2, 3)
    return KeptPass.apply(ShiftedWindows(plan, block_impl, ctx), grouped, k, v).flatten(2, 3)


def _post_units(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: tuple[Rule, ...],
    block_impl: AttentionImpl,
    ctx: AttentionContext,
) -> list[tuple[UnitSwap, Tensor, Pending | None]]:
    """Post the all-to-all of the dilated heads; it overlaps with the window heads' compute.

    None in place of an exchange whose results a second run has from the first.
    """
    pending = []
    for heads in dilated_heads(rules):
        units = UnitLayout(heads, q.shape[2] // k.shape[2], ctx.layout)
        exchange = UnitSwap(units, block_impl, ctx)
        queries = q[:, :, heads.first : heads.first + len(heads.shifts)]
        dense = ctx.impl == "reference"
        if replays() and not dense:
            pending.append((exchange, queries, None))
            continue
        # `SwappedUnits` has its own backward; the reference differentiates the exchange.
        with torch.set_grad_enabled(dense and torch.is_grad_enabled()):
            pending.append((exchange, queries, exchange.post(queries, k, v)))
    return pending


def attend_local(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return the output of a whole sequence on one rank."""
    return scca_attention(q, k, v, rules=_training_rules(q, ctx), **ctx.kernel_arguments)


def _training_rules(q: Tensor, ctx: AttentionContext) -> tuple[Rule, ...]:
    """Return the rules of q's heads. Raise ValueError if they do not fit the documents."""
    rules = held_rules(ctx.options, ctx.heads, q.shape[2])
    check_documents(ctx.options, ctx.heads, ctx.layout.seqlen, ctx.documents)
    return rules


def reference(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return dense attention of a whole sequence: see `scca_reference`."""
    return scca_reference(q, k, v, rules=_training_rules(q, ctx), **ctx.reference_arguments)


def _shape_heads(shape: Shape) -> HeadSlice:
    return shape.heads or HeadSlice(0, shape.nheads, 0, shape.nheads_kv)


def flops(options: SccaOptions, shape: Shape) -> int:
    """Count forward operations of one layer: 4 head_dim per pair that a head's rule selects.

    Raise ValueError if options conflict with each other, the heads or the length.
    """
    if shape.seqlen is None:
        raise ValueError(f"{shape}: seqlen is needed to count operations")
    rules = held_rules(options, _shape_heads(shape), shape.nheads)
    check_documents(options, _shape_heads(shape), shape.seqlen)
    pairs = {rule: rule.pairs(shape.seqlen) for rule in set(rules)}
    return 4 * shape.batch * shape.head_dim * sum(pairs[rule] for rule in rules)


def traffic(options: SccaOptions, shape: Shape, layout: ContextLayout) -> Traffic:
    """Count the bytes that each rank sends in one layer, summed over its rules' exchanges."""
    rules = held_rules(options, _shape_heads(shape), shape.nheads)
    counts = [count(rules, shape, layout) for count in (shift_bytes, swap_bytes, ring_key_bytes)]
    return Traffic(
        tuple(map(sum, zip(*(count.forward for count in counts), strict=True))),
        tuple(map(sum, zip(*(count.backward for count in counts), strict=True))),
    )


def kept_bytes(options: SccaOptions, shape: Shape, layout: ContextLayout) -> int:
    """Count out and lse and, on several ranks, what was received: keys of windows, and units."""
    kept = out_and_lse(options, shape, layout)
    if layout.cp_size == 1:
        return kept
    rules = held_rules(options, _shape_heads(shape), shape.nheads)
    if all(rule.kind == "pair" for rule in rules):
        kept = 0
    # A gradient is sent for each element received, in fp32 or wider.
    received = max(shift_bytes(rules, shape, layout).backward)
    received = received * shape.itemsize // max(4, shape.itemsize)
    return kept + received + unit_bytes(rules, shape, layout)


def check(options: SccaOptions, layout: ContextLayout, heads: HeadSlice, tp_size: int) -> None:
    """Raise ValueError if `attend` would, with a single document."""
    model_rules(options, heads.nheads, heads.nheads_kv)
    check_documents(options, heads, layout.seqlen)
    _check_layout(layout)


def _check_layout(layout: ContextLayout) -> None:
    if layout.cp_size > 1 and layout.kind not in LAYOUTS:
        raise ValueError(
            f"layout kind {layout.kind!r}: scca attention takes {' or '.join(LAYOUTS)}"
        )


def plan_entries(
    options: SccaOptions, layout: ContextLayout, heads: HeadSlice, tp_size: int
) -> int:
    """Count an entry a rank and rule and, on several ranks, one for each window of a rule."""
    rules, cp = set(model_rules(options, heads.nheads, heads.nheads_kv)), layout.cp_size
    # A folded rule counts the divisors of its distance.
    entries = cp * (tp_size + len(rules))
    entries += sum(isqrt(rule.shift // rule.size) for rule in rules if rule.kind == "fold")
    if cp > 1:
        entries += sum(layout.seqlen // rule.size for rule in rules if rule.is_window)
    return entries


def exchange_for(options: SccaOptions) -> tuple[str, ...]:
    """Return the exchanges of one pattern."""
    verbs = {"sda": ("swap",), "sda_key": ("ring",), "longmixed": ("shift", "swap")}
    return verbs.get(options.pattern, ("shift",))


METHOD = AttentionMethod(
    name="scca",
    paper="2312.07305",
    options=SccaOptions,
    layouts=LAYOUTS,
    exchange=("shift", "swap", "ring"),
    supports=frozenset({"gqa", "varlen", "decode", "dense", "rotated"}),
    flops=flops,
    bytes=traffic,
    kept_bytes=kept_bytes,
    impls=IMPLS,
    make_cache=PatternCache,
    functions=ContextFunctions(attend, reference, attend_local=attend_local),
    exchange_for=exchange_for,
    for_layer=for_layer,
    check=check,
    plan_entries=plan_entries,
)
