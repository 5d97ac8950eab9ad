"""Landmark attention under context parallelism: whole blocks on a ring, or only selected blocks.

The last token of every block is its landmark. A query attends to its own block without the
landmark, and to every past block through one gate. The gate's logit is the landmark's score; its
weight is shared by a softmax inside the block (arXiv:2305.16300; formulas:
`lcdist_kernels.landmark.reference`). So a past block is one entry of the gate's softmax, and
partials over whole blocks merge like any others. Without top_k, keys and values go around a ring
in whole blocks.

With top_k, each unit of select_tokens tokens reads the past blocks with the highest landmark
scores, and only these travel (`gather.py`). In a unit of several tokens, a later query influences
which past blocks earlier ones read, never the contents of these blocks. Outputs of whole units
depend on no later token.
"""

import torch
from torch import Tensor

from lcdist.attention.context import AttentionContext
from lcdist.attention.facts import ContextFunctions
from lcdist.attention.interface import AttentionMethod
from lcdist.attention.landmark.cache import make_cache
from lcdist.attention.landmark.gather import attend_selected, reference_selected
from lcdist.attention.landmark.plan import (
    LAYOUTS,
    check,
    check_documents,
    check_head_groups,
    check_layout,
    flops,
    kept_bytes,
    layouts_for,
    multiple_of,
    traffic,
)
from lcdist.attention.landmark.ring import RingLandmark, reference_ring
from lcdist.config.schema import LandmarkOptions
from lcdist_kernels import landmark_attention, landmark_reference
from lcdist_kernels.landmark import IMPLS, select_landmark_impl
from lcdist_kernels.tape import KeptPass


def attend(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return this rank's shard of the output; the last token of every block is a landmark.

    Selection units are counted from the start of the whole sequence and cut at document borders.
    So documents that begin at multiples of select_tokens get the same output as alone.
    """
    _check(q, k, ctx)
    selects, dense = ctx.options.top_k is not None, ctx.impl == "reference"
    rotated_q, rotated_k = ctx.rotate(q), ctx.rotate(k)
    if dense and selects:
        return reference_selected(rotated_q, rotated_k, v, ctx)
    if dense:
        return reference_ring(rotated_q, torch.stack((rotated_k, v)), ctx)
    impl = select_landmark_impl(ctx.impl, q, "landmark attention under context parallelism")
    if selects:
        return attend_selected(rotated_q, rotated_k, v, impl, ctx)
    return KeptPass.apply(RingLandmark(impl, ctx), rotated_q, torch.stack((rotated_k, v)))


def attend_local(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return the output of a whole sequence on one rank."""
    _check(q, k, ctx)
    return landmark_attention(
        q,
        k,
        v,
        block_size=ctx.options.block_size,
        top_k=ctx.options.top_k,
        select_tokens=ctx.options.select_tokens,
        **ctx.kernel_arguments,
    )


def _check(q: Tensor, k: Tensor, ctx: AttentionContext) -> None:
    """Raise ValueError if heads, layout or documents do not fit the options."""
    check_head_groups(ctx.options, ctx.heads, q.shape[2] // k.shape[2])
    check_layout(ctx.options, ctx.layout)
    check_documents(ctx.options, ctx.documents, ctx.layout.seqlen)


def reference(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return dense attention of a whole sequence with documents of any length.

    See `landmark_reference`.
    """
    check_head_groups(ctx.options, ctx.heads, q.shape[2] // k.shape[2])
    return landmark_reference(
        q,
        k,
        v,
        block_size=ctx.options.block_size,
        top_k=ctx.options.top_k,
        select_tokens=ctx.options.select_tokens,
        **ctx.reference_arguments,
    )


def exchange_for(options: LandmarkOptions) -> tuple[str, ...]:
    """Return the exchange: a ring without top_k, a gather of blocks with it."""
    return ("ring",) if options.top_k is None else ("gather",)


METHOD = AttentionMethod(
    name="landmark",
    paper="2305.16300",
    options=LandmarkOptions,
    layouts=LAYOUTS,
    exchange=("ring", "gather"),
    supports=frozenset({"gqa", "varlen", "decode", "landmarks", "rotated"}),
    multiple_of=multiple_of,
    flops=flops,
    bytes=traffic,
    make_cache=make_cache,
    functions=ContextFunctions(attend, reference, attend_local=attend_local),
    kept_bytes=kept_bytes,
    layouts_for=layouts_for,
    exchange_for=exchange_for,
    check=check,
    impls=IMPLS,
)
