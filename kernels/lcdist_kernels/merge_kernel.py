"""Merge two partials of softmax attention in one pass over them: `partial.merge` as a kernel.

Shapes: out `[b, s, h, d]`, lse fp32 `[b, h, s]`. The result is fp32 and takes the memory of the
first partial where that is fp32. A row that saw nothing in either stays 0 and -inf.

    grid    (tiles of tokens, heads, batch); a program reads and writes one tile of each tensor
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcdist_kernels.partial import merge
from lcdist_kernels.softmax_steps import merge_partials
from lcdist_kernels.triton_common import (
    dim_constants,
    launch_context,
    load_tile,
    store_tile,
    strides,
    unsupported_reason,
)

BLOCK_S = 32
Partial = tuple[Tensor, Tensor]


@triton.jit
def _merge_kernel(
    out, lse, out_blk, lse_blk, merged,
    seqlen,
    stride_ob, stride_os, stride_oh, stride_bb, stride_bs, stride_bh,
    stride_mb, stride_ms, stride_mh,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Write the merged out to `merged` and the merged lse to `lse`."""
    start = tl.program_id(0) * BLOCK_S
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_s = start + tl.arange(0, BLOCK_S)
    m_s = o_s < seqlen
    i_row = (i_b * tl.num_programs(1) + i_h) * seqlen
    b_lse = tl.load(lse + i_row + o_s, mask=m_s, other=0.0)
    b_lse_blk = tl.load(lse_blk + i_row + o_s, mask=m_s, other=0.0)
    p_out = out + i_b * stride_ob + i_h * stride_oh
    p_blk = out_blk + i_b * stride_bb + i_h * stride_bh
    b_out = load_tile(p_out, start, seqlen, stride_os, BLOCK_S, HEAD_DIM, BLOCK_D, False)
    b_blk = load_tile(p_blk, start, seqlen, stride_bs, BLOCK_S, HEAD_DIM, BLOCK_D, False)
    b_out, b_lse = merge_partials(
        b_out.to(tl.float32), b_lse, b_blk.to(tl.float32), b_lse_blk
    )  # fmt: skip
    p_merged = merged + i_b * stride_mb + i_h * stride_mh
    store_tile(p_merged, b_out, start, seqlen, stride_ms, BLOCK_S, HEAD_DIM, BLOCK_D)
    tl.store(lse + i_row + o_s, b_lse, mask=m_s)


def merge_visit(partial: Partial | None, visit: Partial, *, by_kernel: bool) -> Partial:
    """Return the partial over the keys of both, which may take the memory of `partial`.

    Args:
        partial: None before the first visit.
        by_kernel: whether to use the kernel, where it takes the tensors; not differentiable.
    """
    if partial is None:
        return visit
    (out, lse), (out_blk, lse_blk) = partial, visit
    if not by_kernel or unsupported_reason(out) is not None or lse.dtype != torch.float32:
        return merge(*partial, *visit)
    in_place = out.dtype == torch.float32
    merged = out if in_place else torch.empty(out.shape, dtype=torch.float32, device=out.device)
    lse, lse_blk = lse.contiguous(), lse_blk.contiguous()
    batch, seqlen, nheads, _ = out.shape
    if not out.numel():
        return merged, lse
    with launch_context(out):
        _merge_kernel[(triton.cdiv(seqlen, BLOCK_S), nheads, batch)](
            out, lse, out_blk, lse_blk, merged, seqlen, *strides(out, out_blk, merged),
            **dim_constants(out), BLOCK_S=BLOCK_S,
        )  # fmt: skip
    return merged, lse
