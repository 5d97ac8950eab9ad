"""Shifted cross chunk attention and its relatives under context parallelism (arXiv:2312.07305).

    out_i = sum_j softmax_j(softmax_scale * q_i . k_j) v_j   over the keys j <= i of i's document

that the head's rule shows (`lcdist_kernels.scca` has the rules, `scca_pattern` says which head has
which). What travels follows the rule: windows of chunks a `shift` of just the intervals they name,
pairs of residues a `swap` over (head, residue) units, residues of keys a `ring` of those keys.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from lcdist.attention.interface import AttentionMethod
from lcdist.attention.scca.pattern import check_documents, for_layer, held_rules, model_rules
from lcdist.attention.scca.ring import KeyRing, RingKeys, reference_keys, ring_key_bytes
from lcdist.attention.scca.shift import ShiftedWindows, Windows, reference_windows, shift_bytes
from lcdist.attention.scca.swap import SwappedUnits, UnitSwap, reference_units, swap_bytes
from lcdist.attention.scca.units import Units, dilated_heads
from lcdist.attention.shape import HeadSlice, Shape, Traffic
from lcdist.attention.shared.checks import check_plain, check_shard, decode_rows, held_heads, tokens
from lcdist.config.schema import SccaOptions
from lcdist.exchange import Group, group_rank
from lcdist.layout import ContextLayout, pieces_needed
from lcdist_kernels import Rotary, scca_attention, scca_reference
from lcdist_kernels.common import check_impl, check_qkv
from lcdist_kernels.full import TORCH_IMPL, AttentionImpl, select_impl
from lcdist_kernels.scca import IMPLS, Rule, head_groups, scca_cached

LAYOUTS = ("contiguous", "zigzag")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    options: SccaOptions,
    layout: ContextLayout,
    group: Group,
    rotary: Rotary | None = None,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    params: Mapping[str, Tensor] | None = None,
    heads: HeadSlice | None = None,
    impl: str = "auto",
) -> Tensor:
    """This rank's shard of the attention of a whole sequence; out is like q.

    q `[b, s_local, h, d]`, k, v `[b, s_local, h_kv, d]`: un-rotated, tokens as `layout` cuts them.
    cu_seqlens: borders of documents in the whole sequence, int32 `[n + 1]`, the same for every row
    and on every rank; positions, chunks and residues restart per document; tokens after the last
    border form one of their own. impl: "auto", "triton", "torch" or "reference".

    Raises ValueError where shapes, layout and group do not fit, `impl` is not built, "triton" does
    not take the tensors, or options contradict each other, the heads or the documents
    (`scca_pattern`).
    """
    check_impl(impl, "scca", IMPLS)
    check_qkv(q, k, v)
    check_shard(q, k, layout, group)
    _check_layout(layout)
    rules = _rules(q, k, options, params, heads, (layout.seqlen, cu_seqlens))
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    if layout.cp_size == 1:
        return scca_attention(
            q,
            k,
            v,
            rules=rules,
            rotary=rotary,
            cu_seqlens=cu_seqlens,
            softmax_scale=scale,
            impl=impl,
        )
    what = "scca attention under context parallelism"
    operator = TORCH_IMPL if impl == "reference" else select_impl(impl, q, what)
    index, starts = tokens(layout, group_rank(group), cu_seqlens)
    if rotary is not None:
        q, k = rotary.rotate(q, index - starts), rotary.rotate(k, index - starts)
    around = (layout, group, cu_seqlens, scale, operator)
    return _exchanged(q, k, v, rules, around, impl == "reference")


def _exchanged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: tuple[Rule, ...],
    around: tuple[ContextLayout, Group, Tensor | None, float, AttentionImpl],
    dense: bool,
) -> Tensor:
    """All heads of rotated q; the all-to-all is posted before anything else."""
    groups = head_groups(rules, k.shape[2])
    grouped = q.unflatten(2, (k.shape[2], -1))
    if rules[0].kind == "key":
        ringed = reference_keys if dense else RingKeys.apply
        return ringed(grouped, k, v, KeyRing(groups, *around)).flatten(2, 3).to(q.dtype)
    posted = []
    for of in dilated_heads(rules):
        exchange = UnitSwap(Units(of, q.shape[2] // k.shape[2], around[0]), *around[1:])
        queries = q[:, :, of.first : of.first + len(of.shifts)]
        with torch.set_grad_enabled(dense and torch.is_grad_enabled()):
            posted.append((exchange, queries, exchange.post(queries, k, v)))
    done = {}
    if any(rule.is_window for rule in rules):
        shifted = reference_windows if dense else ShiftedWindows.apply
        out = shifted(grouped, k, v, Windows(groups, *around)).flatten(2, 3)
        done = {i: out[:, :, i : i + 1] for i, rule in enumerate(rules) if rule.is_window}
        if not posted:
            return out
    for exchange, queries, pending in posted:
        done[exchange.units.heads.first] = (
            reference_units(exchange, pending)
            if dense
            else SwappedUnits.apply(queries, k, v, exchange, pending)
        )
    return torch.cat([done[first] for first in sorted(done)], 2)


def _rules(
    q: Tensor,
    k: Tensor,
    options: SccaOptions,
    params: Mapping[str, Tensor] | None,
    heads: HeadSlice | None,
    documents: tuple[int, Tensor | None] | None,
) -> tuple[Rule, ...]:
    """The rules of q's heads, all refusals of options made. documents: seqlen and cu_seqlens."""
    check_plain(q, k, params, heads, "scca")
    held = held_heads(heads, q, k)
    rules = held_rules(options, held, q.shape[2])
    if documents is not None:
        check_documents(options, held, *documents)
    return rules


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    options: SccaOptions,
    rotary: Rotary | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    params: Mapping[str, Tensor] | None = None,
    heads: HeadSlice | None = None,
) -> Tensor:
    """The same on the whole sequence, dense, in one process: see `scca_reference`."""
    check_qkv(q, k, v)
    rules = _rules(q, k, options, params, heads, (q.shape[1], cu_seqlens))
    return scca_reference(
        q,
        k,
        v,
        rules=rules,
        rotary=rotary,
        positions=positions,
        cu_seqlens=cu_seqlens,
        softmax_scale=softmax_scale,
    )


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    options: SccaOptions,
    positions: Tensor,
    rotary: Rotary | None = None,
    softmax_scale: float | None = None,
    params: Mapping[str, Tensor] | None = None,
    heads: HeadSlice | None = None,
) -> Tensor:
    """Attention of new tokens, by the pattern, over a cache that holds their own keys already.

    q `[b, n, h, d]`, un-rotated, at `positions`: integers on the CPU, `[n]` or, where rows differ
    in length, `[b, n]`. k_cache, v_cache `[b, s_cache, h_kv, d]`, un-rotated: entry j belongs to
    position j; only entries that the pattern shows are read. No gradients; out is like q. How long
    the document will be is not known here: under flow with wrap = "mask" a head whose shift leads
    before its start gives 0. Raises ValueError where shapes do not fit, a position lies outside the
    cache, or options contradict each other or the heads.
    """
    check_qkv(q, k_cache, v_cache)
    rules = _rules(q, k_cache, options, params, heads, None)
    one = partial(scca_cached, rules=rules, rotary=rotary, softmax_scale=softmax_scale)
    return decode_rows(q, k_cache, v_cache, positions, one)


def _rules_of(options: SccaOptions, shape: Shape) -> tuple[Rule, ...]:
    heads = shape.heads or HeadSlice(0, shape.nheads, 0, shape.nheads_kv)
    return held_rules(options, heads, shape.nheads)


def flops(options: SccaOptions, shape: Shape) -> int:
    """Forward operations of one layer: 4 head_dim for each pair that a head's rule shows.

    Raises ValueError where options contradict each other, the heads or the length.
    """
    if shape.seqlen is None:
        raise ValueError(f"{shape}: seqlen is needed to count operations")
    rules = _rules_of(options, shape)
    heads = shape.heads or HeadSlice(0, shape.nheads, 0, shape.nheads_kv)
    check_documents(options, heads, shape.seqlen)
    pairs = {rule: rule.pairs(shape.seqlen) for rule in set(rules)}
    return 4 * shape.batch * shape.head_dim * sum(pairs[rule] for rule in rules)


def traffic(options: SccaOptions, shape: Shape, layout: ContextLayout) -> Traffic:
    """Bytes each rank sends in one layer: the sum of what its rules' exchanges send."""
    rules = _rules_of(options, shape)
    counted = [count(rules, shape, layout) for count in (shift_bytes, swap_bytes, ring_key_bytes)]
    return Traffic(
        tuple(map(sum, zip(*(sent.forward for sent in counted), strict=True))),
        tuple(map(sum, zip(*(sent.backward for sent in counted), strict=True))),
    )


def multiple_of(options: SccaOptions, cp_size: int, kind: str = "contiguous") -> int:
    """What the layout itself needs: chunks may cut shards anywhere."""
    return pieces_needed(kind, cp_size)


def check(options: SccaOptions, layout: ContextLayout, heads: HeadSlice, tp_size: int) -> None:
    """Raises ValueError where `attention` would, whatever the documents, before anything runs."""
    model_rules(options, heads.nheads, heads.nheads_kv)
    check_documents(options, heads, layout.seqlen)
    _check_layout(layout)


def _check_layout(layout: ContextLayout) -> None:
    if layout.cp_size > 1 and layout.kind not in LAYOUTS:
        raise ValueError(
            f"layout kind {layout.kind!r}: scca attention takes {' or '.join(LAYOUTS)}"
        )


def exchange_for(options: SccaOptions) -> tuple[str, ...]:
    """The verbs of one pattern."""
    verbs = {"sda": ("swap",), "sda_key": ("ring",), "longmixed": ("shift", "swap")}
    return verbs.get(options.pattern, ("shift",))


METHOD = AttentionMethod(
    name="scca",
    paper="2312.07305",
    options=SccaOptions,
    layouts=LAYOUTS,
    exchange=("shift", "swap", "ring"),
    supports=frozenset({"gqa", "varlen", "decode", "dense"}),
    multiple_of=multiple_of,
    flops=flops,
    bytes=traffic,
    impls=IMPLS,
    reference=reference,
    attention=attention,
    decode=decode,
    exchange_for=exchange_for,
    for_layer=for_layer,
    check=check,
)
