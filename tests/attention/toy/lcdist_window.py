"""A sixth method in one file: attention over the last `window` tokens (arXiv:2004.05150).

    out_i = sum_j softmax_j(softmax_scale q_i . k_j) v_j   over max(lo_i, i - window + 1) <= j <= i,

lo_i being the first token of i's document. Under context parallelism every rank is sent the
window - 1 tokens before its own, from as many ranks as hold them. Dense maths throughout: an
example to start from, not to train with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lcdist.attention import AttentionMethod, HeadSlice, Shape, Traffic
from lcdist.attention.common import check_plain, check_shard, decode_rows, tokens
from lcdist.exchange import Group, group_rank, shift
from lcdist.layout import ContextLayout
from lcdist_kernels import Rotary
from lcdist_kernels.common import check_impl, check_qkv, check_self, document_starts, wide_dtype
from lcdist_kernels.full import full_partial, visible


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """window: tokens that a query sees, itself included."""

    window: int = field(default=7, metadata={"min": 1})


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    options: WindowOptions,
    rotary: Rotary | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    params: Mapping[str, Tensor] | None = None,
    heads: HeadSlice | None = None,
) -> Tensor:
    """The whole sequence in one process: see `AttentionMethod`."""
    check_self(q, k, v)
    check_plain(q, k, params, heads, "window")
    index = torch.arange(q.shape[1])
    starts = document_starts(cu_seqlens, index, q.shape[1])
    positions = index - starts if positions is None else positions
    if rotary is not None:
        q, k = rotary.rotate(q, positions), rotary.rotate(k, positions)
    return _over(q, k, v, (index, starts, index), options, softmax_scale)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    options: WindowOptions,
    layout: ContextLayout,
    group: Group,
    rotary: Rotary | None = None,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    params: Mapping[str, Tensor] | None = None,
    heads: HeadSlice | None = None,
    impl: str = "auto",
) -> Tensor:
    """This rank's shard: see `AttentionMethod`."""
    check_impl(impl, "window", METHOD.impls)
    check_qkv(q, k, v)
    check_shard(q, k, layout, group)
    check_plain(q, k, params, heads, "window")
    rank = group_rank(group)
    index, starts = tokens(layout, rank, cu_seqlens)
    if rotary is not None:
        q, k = rotary.rotate(q, index - starts), rotary.rotate(k, index - starts)
    if layout.cp_size == 1:
        return _over(q, k, v, (index, starts, index), options, softmax_scale)
    # Gradients of one key come home from several ranks: they travel, and are summed, in fp32.
    wide = wide_dtype(q.dtype)
    kv = torch.cat((k, v), -1).to(wide)
    before = shift(kv, _plan(options, layout), group).wait()
    k_all, v_all = torch.cat((before, kv), 1).chunk(2, -1)
    first = int(index[0]) - before.shape[1]
    seen = torch.arange(first, int(index[-1]) + 1)
    return _over(q, k_all, v_all, (index, starts, seen), options, softmax_scale)


@torch.no_grad()
def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    options: WindowOptions,
    positions: Tensor,
    rotary: Rotary | None = None,
    softmax_scale: float | None = None,
    params: Mapping[str, Tensor] | None = None,
    heads: HeadSlice | None = None,
) -> Tensor:
    """New tokens against a cache: see `AttentionMethod`."""
    check_plain(q, k_cache, params, heads, "window")

    def one(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        index = torch.arange(k.shape[1])
        if rotary is not None:
            q, k = rotary.rotate(q, positions), rotary.rotate(k, index)
        band = (positions, torch.zeros_like(positions), index)
        return _over(q, k, v, band, options, softmax_scale)

    return decode_rows(q, k_cache, v_cache, positions, one)


def _over(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: tuple[Tensor, Tensor, Tensor],
    options: WindowOptions,
    softmax_scale: float | None,
) -> Tensor:
    """Rotated q over k, v; band: numbers of the queries, their documents' starts, of the keys."""
    index, starts, seen = band
    mask = visible(index, torch.maximum(starts, index - options.window + 1), seen).to(q.device)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    return full_partial(q, k, v, mask, scale)[0].to(q.dtype)


def _plan(options: WindowOptions, layout: ContextLayout) -> list[tuple[int, int, int, int]]:
    """(from, to, start, stop) in the sender's own tokens: the window before every rank's first."""
    local, plan = layout.local_seqlen, []
    for to in range(layout.cp_size):
        first, stop = max(0, to * local - options.window + 1), to * local
        for sender in range(first // local, to):
            start = max(first - sender * local, 0)
            plan.append((sender, to, start, min(stop - sender * local, local)))
    return plan


def flops(options: WindowOptions, shape: Shape) -> int:
    """4 head_dim for every visible pair."""
    assert shape.seqlen is not None
    window = min(options.window, shape.seqlen)
    pairs = window * (window + 1) // 2 + (shape.seqlen - window) * window
    return 4 * shape.batch * shape.nheads * shape.head_dim * pairs


def traffic(options: WindowOptions, shape: Shape, layout: ContextLayout) -> Traffic:
    """Keys and values of the window, in fp32 at least; their gradients the other way."""
    token = 2 * shape.batch * shape.nheads_kv * shape.head_dim * max(4, shape.itemsize)
    out, back = [0] * layout.cp_size, [0] * layout.cp_size
    for sender, to, start, stop in _plan(options, layout):
        out[sender] += (stop - start) * token
        back[to] += (stop - start) * token
    return Traffic(tuple(out), tuple(back))


def multiple_of(options: WindowOptions, cp_size: int, kind: str = "contiguous") -> int:
    """As many tokens on every rank."""
    return cp_size


METHOD = AttentionMethod(
    name="window",
    paper="2004.05150",
    options=WindowOptions,
    layouts=("contiguous",),
    exchange=("shift",),
    supports=frozenset({"gqa", "varlen", "decode"}),
    multiple_of=multiple_of,
    flops=flops,
    bytes=traffic,
    reference=reference,
    attention=attention,
    decode=decode,
)
