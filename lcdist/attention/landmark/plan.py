"""Landmark attention: checks of lengths, layouts, documents and heads; operations and bytes."""

from math import lcm

from lcdist.attention.facts import out_and_lse
from lcdist.attention.shape import HeadSlice, Shape, Traffic
from lcdist.attention.shared.ring_softmax import ring_bytes
from lcdist.config.schema import LandmarkOptions
from lcdist.layout import ContextLayout, pieces_needed

LAYOUTS = ("contiguous", "zigzag")


def layouts_for(options: LandmarkOptions) -> tuple[str, ...]:
    """Return the layout kinds; with top_k only contiguous, because a unit is consecutive tokens."""
    return LAYOUTS if options.top_k is None else LAYOUTS[:1]


def multiple_of(options: LandmarkOptions, cp_size: int, kind: str = "contiguous") -> int:
    """Return the divisor for whole blocks per piece; with top_k and cp > 1, also whole units."""
    step = options.block_size
    if options.top_k is not None and cp_size > 1:
        step = lcm(step, options.select_tokens)
    return pieces_needed(kind, cp_size) * step


def check(options: LandmarkOptions, layout: ContextLayout, heads: HeadSlice, tp_size: int) -> None:
    """Raise ValueError if the options conflict with the layout or tensor parallelism."""
    check_layout(options, layout)
    group = heads.nheads // heads.nheads_kv
    held = group if tp_size <= heads.nheads_kv else heads.nheads // tp_size
    check_head_groups(options, heads, held)


def check_head_groups(options: LandmarkOptions, heads: HeadSlice, held: int) -> None:
    """Raise ValueError if heads that select together are on different ranks.

    held: query heads per key head that this rank holds.
    """
    group = heads.nheads // heads.nheads_kv
    if options.top_k is not None and held != group:
        raise ValueError(
            f"top_k = {options.top_k} selects blocks for the {group} query heads of a key head "
            f"together, and tensor parallelism leaves {held} of them on a rank: use a tp_size that "
            f"divides nheads_kv = {heads.nheads_kv}, or leave top_k out"
        )


def check_layout(options: LandmarkOptions, layout: ContextLayout) -> None:
    """Raise ValueError if the layout's kind or its pieces do not fit blocks and units."""
    legal = layouts_for(options)
    if layout.kind not in legal:
        raise ValueError(
            f"layout = {layout.kind!r}: landmark attention with top_k = {options.top_k} goes with "
            f"{', '.join(legal)}"
        )
    if layout.cp_size == 1:
        return
    piece = layout.seqlen // pieces_needed(layout.kind, layout.cp_size)
    divisors = {"block_size": options.block_size}
    if options.top_k is not None:
        divisors["select_tokens"] = options.select_tokens
    for name, value in divisors.items():
        if piece % value:
            raise ValueError(
                f"{name} = {value} does not divide the {piece} consecutive tokens that each rank "
                f"holds of seqlen = {layout.seqlen} ({layout.kind}, cp_size = {layout.cp_size}): "
                f"use a divisor of {piece}, or another seqlen or cp_size"
            )


def check_documents(
    options: LandmarkOptions, documents: tuple[int, ...] | None, seqlen: int
) -> None:
    """Raise ValueError if a document begins inside a block. documents: borders; None: one."""
    for document, start in enumerate(documents or ()):
        if start % options.block_size and start != seqlen:
            raise ValueError(
                f"document {document} begins at token {start}, which is no multiple of block_size "
                f"= {options.block_size}: pad the document before it, as the loader does"
            )


def flops(options: LandmarkOptions, shape: Shape) -> int:
    """Count forward operations of one layer: 2 head_dim per score and per value that is read.

    A past block costs a row block_size scores and block_size - 1 values. With top_k a row reads at
    most top_k of them, and one score per past landmark. Raise ValueError without shape.seqlen.
    """
    if shape.seqlen is None:
        raise ValueError(f"{shape}: seqlen is needed to count operations")
    size, top_k = options.block_size, options.top_k
    blocks, rest = divmod(shape.seqlen, size)
    past = blocks * (blocks - 1) // 2
    reads, scored = past, 0
    if top_k is not None:
        full = max(0, blocks - top_k)  # blocks that have top_k or more before them
        few = blocks - full
        reads, scored = few * (few - 1) // 2 + full * top_k, past
    count = blocks * 2 * (size * (size + 1) // 2 - 1) + size * (reads * (2 * size - 1) + scored)
    last = blocks if top_k is None else min(blocks, top_k)
    count += rest * (rest + 1) + rest * (last * (2 * size - 1) + (0 if top_k is None else blocks))
    return 2 * shape.batch * shape.nheads * shape.head_dim * count


def kept_bytes(options: LandmarkOptions, shape: Shape, layout: ContextLayout) -> int:
    """Count out, lse and, with top_k, the choice; on several ranks at most the blocks received."""
    kept, cp = out_and_lse(options, shape, layout), layout.cp_size
    if options.top_k is None:
        return kept
    heads = shape.batch * shape.nheads_kv
    blocks = layout.seqlen // options.block_size
    choices = -(-layout.local_seqlen // options.select_tokens) * min(options.top_k, blocks)
    # Numbers of blocks are int32, those of requested ones int64.
    kept += 4 * heads * choices
    if cp == 1:
        return kept
    block = 2 * options.block_size * shape.head_dim * shape.itemsize
    return kept + heads * min(choices, blocks) * (block + 8)


def traffic(options: LandmarkOptions, shape: Shape, layout: ContextLayout) -> Traffic:
    """Count the bytes that each rank sends in one layer; with top_k, an upper bound.

    Without top_k: those of the ring. With top_k: the landmarks' keys to every rank; the numbers of
    requested blocks; these blocks to later ranks, and their gradients back, in fp32 or wider. The
    requests depend on the values: at most top_k blocks per unit, batch row and key head. Documents
    that begin inside a unit make more units, which are not counted here.
    """
    if options.top_k is None or layout.cp_size == 1:
        return ring_bytes(shape, layout, 2 * shape.head_dim)
    cp, rows = layout.cp_size, shape.batch * shape.nheads_kv
    blocks = layout.local_seqlen // options.block_size
    most_blocks = options.top_k * (layout.local_seqlen // options.select_tokens)
    landmarks = rows * blocks * shape.head_dim * shape.itemsize
    elements = 2 * options.block_size * shape.head_dim
    block, dblock = elements * shape.itemsize, elements * max(4, shape.itemsize)
    requested = [rows * min(most_blocks, rank * blocks) for rank in range(cp)]
    served = [rows * min(most_blocks, blocks) * (cp - 1 - rank) for rank in range(cp)]
    requests = [8 * cp * (cp - 1) + 8 * count for count in requested]
    forward = [
        (cp - 1) * landmarks + request + count * block
        for request, count in zip(requests, served, strict=True)
    ]
    return Traffic(tuple(forward), tuple(count * dblock for count in requested))
