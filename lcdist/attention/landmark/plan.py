"""What landmark attention asks of lengths, layouts, documents and heads, and what it costs."""

from collections.abc import Mapping
from math import lcm

import torch
from torch import Tensor

from lcdist.attention.shape import HeadSlice, Shape, Traffic
from lcdist.attention.shared.checks import check_plain
from lcdist.attention.shared.ring_softmax import ring_bytes
from lcdist.config.schema import LandmarkOptions
from lcdist.layout import ContextLayout, pieces_needed
from lcdist_kernels.common import document_starts

LAYOUTS = ("contiguous", "zigzag")


def layouts_for(options: LandmarkOptions) -> tuple[str, ...]:
    """Contiguous and zigzag; with top_k contiguous, as a unit is of consecutive tokens."""
    return LAYOUTS if options.top_k is None else LAYOUTS[:1]


def multiple_of(options: LandmarkOptions, cp_size: int, kind: str = "contiguous") -> int:
    """Whole blocks in every piece of the layout; with top_k on more ranks, whole units too."""
    step = options.block_size
    if options.top_k is not None and cp_size > 1:
        step = lcm(step, options.select_tokens)
    return pieces_needed(kind, cp_size) * step


def check(options: LandmarkOptions, layout: ContextLayout, heads: HeadSlice, tp_size: int) -> None:
    """Raises ValueError where the options do not go with the layout or tensor parallelism."""
    check_layout(options, layout)
    group = heads.nheads // heads.nheads_kv
    _check_groups(options, heads, group if tp_size <= heads.nheads_kv else heads.nheads // tp_size)


def check_heads(
    q: Tensor,
    k: Tensor,
    params: Mapping[str, Tensor] | None,
    heads: HeadSlice | None,
    options: LandmarkOptions,
) -> None:
    """Raises ValueError as `check_plain`, and where heads that choose together are apart."""
    check_plain(q, k, params, heads, "landmark")
    if heads is not None:
        _check_groups(options, heads, q.shape[2] // k.shape[2])


def _check_groups(options: LandmarkOptions, heads: HeadSlice, held: int) -> None:
    group = heads.nheads // heads.nheads_kv
    if options.top_k is not None and held != group:
        raise ValueError(
            f"top_k = {options.top_k} chooses blocks for the {group} query heads of a key head "
            f"together, and tensor parallelism leaves {held} of them on a rank: use a tp_size that "
            f"divides nheads_kv = {heads.nheads_kv}, or leave top_k out"
        )


def check_layout(options: LandmarkOptions, layout: ContextLayout) -> None:
    legal = layouts_for(options)
    if layout.kind not in legal:
        raise ValueError(
            f"layout = {layout.kind!r}: landmark attention with top_k = {options.top_k} goes with "
            f"{', '.join(legal)}"
        )
    if layout.cp_size == 1:
        return
    piece = layout.seqlen // pieces_needed(layout.kind, layout.cp_size)
    fits = {"block_size": options.block_size}
    if options.top_k is not None:
        fits["select_tokens"] = options.select_tokens
    for name, value in fits.items():
        if piece % value:
            raise ValueError(
                f"{name} = {value} does not divide the {piece} consecutive tokens that each rank "
                f"holds of seqlen = {layout.seqlen} ({layout.kind}, cp_size = {layout.cp_size}): "
                f"use a divisor of {piece}, or another seqlen or cp_size"
            )


def check_documents(options: LandmarkOptions, cu_seqlens: Tensor | None, seqlen: int) -> None:
    if cu_seqlens is None:
        return
    document_starts(cu_seqlens, torch.arange(0), seqlen)
    for document, start in enumerate(cu_seqlens.tolist()):
        if start % options.block_size and start != seqlen:
            raise ValueError(
                f"document {document} begins at token {start}, which is no multiple of block_size "
                f"= {options.block_size}: pad the document before it, as the loader does"
            )


def flops(options: LandmarkOptions, shape: Shape) -> int:
    """Forward operations of one layer: 2 head_dim for each score and each value that is touched.

    A past block costs a row block_size scores and a value less; with top_k there are top_k of them
    at most, and one score for every past landmark. Raises ValueError without shape.seqlen.
    """
    if shape.seqlen is None:
        raise ValueError(f"{shape}: seqlen is needed to count operations")
    size, touched = options.block_size, 0
    for block in range(-(-shape.seqlen // size)):
        rows = min(size, shape.seqlen - block * size)
        own = rows * (rows + 1) // 2 - (rows == size)
        read = block if options.top_k is None else min(block, options.top_k)
        choice = 0 if options.top_k is None else block
        touched += 2 * own + rows * (read * (2 * size - 1) + choice)
    return 2 * shape.batch * shape.nheads * shape.head_dim * touched


def traffic(options: LandmarkOptions, shape: Shape, layout: ContextLayout) -> Traffic:
    """Bytes each rank sends in one layer: the ring's; with top_k, the most that it can be.

    With top_k: the landmarks' keys to every rank; the numbers of the blocks asked for; those blocks
    to all later ranks, and their gradients home, in fp32 at least. What is asked for hangs on the
    values: at most top_k blocks a unit, batch row and key head. Documents that begin inside a unit
    make more units, which are not reckoned with here.
    """
    if options.top_k is None or layout.cp_size == 1:
        return ring_bytes(shape, layout, 2 * shape.head_dim)
    cp, rows = layout.cp_size, shape.batch * shape.nheads_kv
    blocks = layout.local_seqlen // options.block_size
    most = options.top_k * (layout.local_seqlen // options.select_tokens)
    landmarks = rows * blocks * shape.head_dim * shape.itemsize
    elements = 2 * options.block_size * shape.head_dim
    block, dblock = elements * shape.itemsize, elements * max(4, shape.itemsize)
    asked = [rows * min(most, rank * blocks) for rank in range(cp)]
    served = [rows * min(most, blocks) * (cp - 1 - rank) for rank in range(cp)]
    requests = [8 * cp * (cp - 1) + 8 * count for count in asked]
    forward = [
        (cp - 1) * landmarks + request + count * block
        for request, count in zip(requests, served, strict=True)
    ]
    return Traffic(tuple(forward), tuple(count * dblock for count in asked))
