"""Steps of a tile of queries over past blocks, shared by landmark attention's kernels.

The formulas are in `block_gates`. Scores are base 2; qk_scale >= 0.

    small blocks, SIZE <= BLOCK_N: a tile of BLOCK_N columns holds BLOCKS blocks of WIDTH columns
    each, WIDTH = SIZE rounded up to a power of two; a reshape separates the blocks

        |<----------- BLOCK_N ----------->|
        | c c c M . | c c c M . | c c c M . |      c content, M landmark, . padding
        |<- WIDTH ->|

    a large block, SIZE > BLOCK_N, takes STEPS tiles: forward with an accumulator of its own,
    backward once for the softmax inside and once for the gradients
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lcdist_kernels.landmark.tile_configs import BlockTables
from lcdist_kernels.triton_common import (
    LOWEST,
    Launch,
    choose_key,
    choose_launch,
    dot,
    is_hopper,
    load_rows,
    reciprocal,
)


class Tiling(NamedTuple):
    """Layout of blocks of one size in tiles of keys; see the module."""

    size: int
    blocks: int
    width: int
    steps: int

    def constants(self) -> dict[str, int]:
        """Return the keyword arguments of a launch."""
        return {"SIZE": self.size, "BLOCKS": self.blocks, "WIDTH": self.width, "STEPS": self.steps}


def tiling_of(size: int, block_n: int) -> Tiling:
    """Return the layout of blocks of `size` tokens in tiles of block_n keys, a power of two."""
    width = triton.next_power_of_2(size)
    if width <= block_n:
        return Tiling(size, block_n // width, width, 1)
    return Tiling(size, 1, block_n, triton.cdiv(size, block_n))


def launch_for(tables: BlockTables, x: torch.Tensor, size: int, described: bool = False) -> Launch:
    """Return the launch of one kernel for x `[b, s, h, d]` and blocks of `size` tokens.

    Where two tiles of keys hold a block, the tile is widened to the block and has half the queries,
    unless there is an entry for such blocks. described: k and v may have descriptors.
    """
    width = triton.next_power_of_2(size)
    hopper = tables.hopper | tables.described if described else tables.hopper
    launch = choose_launch(tables.small, x, hopper)
    if width <= launch.block_n:
        return launch
    if width == 2 * launch.block_n and width <= 128 and launch.block_m >= 32:
        key = choose_key(tables.small, x)
        if key in tables.wide_hopper and is_hopper(x):
            return tables.wide_hopper[key]
        stages = max(1, launch.num_stages - 1)
        return Launch(launch.block_m // 2, width, launch.num_warps, stages)
    return choose_launch(tables.large, x, tables.large_hopper)


@triton.jit
def _block_max(b, ROWS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the maximum over each block, `[rows, blocks]`, of a tile of columns."""
    b = tl.max(b, 1)[:, None] if BLOCKS == 1 else tl.max(tl.reshape(b, [ROWS, BLOCKS, WIDTH]), 2)
    return b


@triton.jit
def _block_sum(b, ROWS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the sum over each block, `[rows, blocks]`, of a tile of columns."""
    b = tl.sum(b, 1)[:, None] if BLOCKS == 1 else tl.sum(tl.reshape(b, [ROWS, BLOCKS, WIDTH]), 2)
    return b


@triton.jit
def to_columns(b, ROWS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Repeat a value of each block for each of its columns."""
    if BLOCKS > 1:
        b = tl.broadcast_to(b[:, :, None], [ROWS, BLOCKS, WIDTH])
        b = tl.reshape(b, [ROWS, BLOCKS * WIDTH])
    return b


@triton.jit
def block_softmax(
    b_s,
    o_in,
    qk_scale,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return exp2(scores - maximum of the block), its sum per block, and landmarks' scores.

    b_s: q . k. As qk_scale >= 0, the maximum is scaled once a block, and a score in one fused
    operation.
    """
    b_x = tl.where((o_in == SIZE - 1)[None, :], b_s, 0.0)
    b_x = _block_sum(b_x, ROWS, BLOCKS, WIDTH) * qk_scale
    m_content = (o_in < SIZE - 1)[None, :]
    b_max = _block_max(tl.where(m_content, b_s, float("-inf")), ROWS, BLOCKS, WIDTH) * qk_scale
    b_p = b_s * qk_scale - to_columns(b_max, ROWS, BLOCKS, WIDTH)
    b_p = tl.exp2(tl.where(m_content, b_p, float("-inf")))
    return b_p, _block_sum(b_p, ROWS, BLOCKS, WIDTH), b_x


@triton.jit
def weigh_blocks(b_x, b_block_sum, b_max, b_sum):
    """Return (factor of each block, factor of earlier sums, max, sum) after some whole blocks.

    b_x: scores of landmarks, -inf where hidden. The weight of a key is its part of `block_softmax`
    times the factor of its block.
    """
    b_new = tl.maximum(b_max, tl.max(b_x, 1))
    b_gate = tl.exp2(b_x - b_new[:, None])
    b_rescale = tl.exp2(b_max - b_new)
    return b_gate * reciprocal(b_block_sum), b_rescale, b_new, b_sum * b_rescale + tl.sum(b_gate, 1)


@triton.jit
def past_fwd(
    b_q, b_k, b_v, b_out, b_max, b_sum, o_in, m_visible, qk_scale,
    SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return (out, max, sum) after some whole blocks.

    o_in: each column's place in its block `[BLOCK_N]`. m_visible: bool `[BLOCK_M, BLOCKS]`, read
    where MASKED.
    """
    b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    b_p, b_block_sum, b_x = block_softmax(b_s, o_in, qk_scale, SIZE, BLOCK_M, BLOCKS, WIDTH)
    if MASKED:
        b_x = tl.where(m_visible, b_x, float("-inf"))
    b_factor, b_rescale, b_max, b_sum = weigh_blocks(b_x, b_block_sum, b_max, b_sum)
    b_p = b_p * to_columns(b_factor, BLOCK_M, BLOCKS, WIDTH)
    b_out = dot(b_p.to(b_v.dtype), b_v, b_out * b_rescale[:, None])
    return b_out, b_max, b_sum


@triton.jit
def large_fwd(
    b_q, p_k, p_v, b_out, b_max, b_sum, stride_ks, stride_vs, m_visible, qk_scale,
    SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STEPS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the same as `past_fwd` after one large block that starts at p_k and p_v."""
    b_in = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_block_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    b_block_sum = tl.zeros([BLOCK_M], tl.float32)
    b_x = tl.zeros([BLOCK_M], tl.float32)
    for i in range(0, STEPS):
        o_in = i * BLOCK_N + tl.arange(0, BLOCK_N)
        o_at = o_in.to(tl.int64)
        b_k = load_rows(p_k, o_at * stride_ks, o_in < SIZE, HEAD_DIM, BLOCK_D)
        b_v = load_rows(p_v, o_at * stride_vs, o_in < SIZE, HEAD_DIM, BLOCK_D)
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        b_x += tl.sum(tl.where((o_in == SIZE - 1)[None, :], b_s, 0.0), 1) * qk_scale
        m_content = (o_in < SIZE - 1)[None, :]
        b_top = tl.max(tl.where(m_content, b_s, LOWEST), 1) * qk_scale
        b_new_max = tl.maximum(b_block_max, b_top)
        b_p = b_s * qk_scale - b_new_max[:, None]
        b_p = tl.exp2(tl.where(m_content, b_p, float("-inf")))
        b_rescale = tl.exp2(b_block_max - b_new_max)
        b_block_sum = b_block_sum * b_rescale + tl.sum(b_p, 1)
        b_in = dot(b_p.to(b_v.dtype), b_v, b_in * b_rescale[:, None])
        b_block_max = b_new_max
    if MASKED:
        b_x = tl.where(m_visible, b_x, float("-inf"))
    b_new = tl.maximum(b_max, b_x)
    b_gate = tl.exp2(b_x - b_new)
    b_rescale = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_rescale + b_gate
    b_out = b_out * b_rescale[:, None] + b_in * (b_gate / b_block_sum)[:, None]
    return b_out, b_new, b_sum


@triton.jit
def _gate_grads(
    b_s, b_du, b_lse, b_delta, o_in, m_visible, qk_scale,
    SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Return (weights, gradients of scores) of whole blocks.

    b_s: q . k. b_du: dout . v. b_lse: of the whole row, base 2.
    """
    b_p, b_block_sum, b_x = block_softmax(b_s, o_in, qk_scale, SIZE, ROWS, BLOCKS, WIDTH)
    b_gate = tl.exp2(b_x - b_lse[:, None])
    if MASKED:
        b_gate = tl.where(m_visible, b_gate, 0.0)
    return grads_of_gates(b_p, b_block_sum, b_gate, b_du, b_delta, o_in, SIZE, ROWS, BLOCKS, WIDTH)


@triton.jit
def grads_of_gates(
    b_p, b_block_sum, b_gate, b_du, b_delta, o_in,
    SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return (weights, gradients of scores) of whole blocks, from their softmax and gates."""
    b_inverse = reciprocal(b_block_sum)
    b_mean = _block_sum(b_p * b_du, ROWS, BLOCKS, WIDTH) * b_inverse
    b_p = b_p * to_columns(b_gate * b_inverse, ROWS, BLOCKS, WIDTH)
    b_ds = b_p * (b_du - to_columns(b_mean, ROWS, BLOCKS, WIDTH))
    b_dx = b_gate * (b_mean - b_delta[:, None])
    m_mark = (o_in == SIZE - 1)[None, :]
    return b_p, tl.where(m_mark, to_columns(b_dx, ROWS, BLOCKS, WIDTH), b_ds)


@triton.jit
def past_dq(
    b_q, b_dout, b_dq, b_lse, b_delta, b_k, b_v, o_in, m_visible, qk_scale,
    SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return dq, without softmax_scale, after some whole blocks; arguments as in `past_fwd`."""
    b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    b_du = dot(b_dout, tl.trans(b_v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    _, b_ds = _gate_grads(
        b_s, b_du, b_lse, b_delta, o_in, m_visible, qk_scale, SIZE, BLOCK_M, BLOCKS, WIDTH, MASKED
    )
    return dot(b_ds.to(b_k.dtype), b_k, b_dq)


@triton.jit
def past_dkv(
    b_q, b_dout, b_dk, b_dv, b_lse, b_delta, b_k, b_v, o_in, m_visible, qk_scale,
    SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return (dk, dv) after more queries; dk without softmax_scale; as in `past_fwd`.

    Queries are rows here too, so that the softmax of a block stays within neighbouring threads.
    """
    b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    b_du = dot(b_dout, tl.trans(b_v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    b_p, b_ds = _gate_grads(
        b_s, b_du, b_lse, b_delta, o_in, m_visible, qk_scale, SIZE, BLOCK_M, BLOCKS, WIDTH, MASKED
    )
    b_dv = dot(tl.trans(b_p.to(b_dout.dtype)), b_dout, b_dv)
    b_dk = dot(tl.trans(b_ds.to(b_q.dtype)), b_q, b_dk)
    return b_dk, b_dv


@triton.jit
def own_dkv(
    b_q, b_dout, b_dk, b_dv, b_lse, b_delta, b_k, b_v, m_visible, qk_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return (dk, dv) after more queries of the keys' own block, where each key is an entry."""
    b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    b_du = dot(b_dout, tl.trans(b_v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    b_p = tl.where(m_visible, tl.exp2(b_s * qk_scale - b_lse[:, None]), 0.0)
    b_dv = dot(tl.trans(b_p.to(b_dout.dtype)), b_dout, b_dv)
    b_ds = b_p * (b_du - b_delta[:, None])
    b_dk = dot(tl.trans(b_ds.to(b_q.dtype)), b_q, b_dk)
    return b_dk, b_dv


@triton.jit
def _large_stats(
    b_q, b_dout, b_lse, p_k, p_v, stride_ks, stride_vs, m_visible, qk_scale,
    SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STEPS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return, for each row and a large block: its lse (base 2), mean of dout . v, and the gate."""
    b_block_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    b_block_sum = tl.zeros([BLOCK_M], tl.float32)
    b_mean = tl.zeros([BLOCK_M], tl.float32)
    b_x = tl.zeros([BLOCK_M], tl.float32)
    for i in range(0, STEPS):
        o_in = i * BLOCK_N + tl.arange(0, BLOCK_N)
        o_at = o_in.to(tl.int64)
        b_k = load_rows(p_k, o_at * stride_ks, o_in < SIZE, HEAD_DIM, BLOCK_D)
        b_v = load_rows(p_v, o_at * stride_vs, o_in < SIZE, HEAD_DIM, BLOCK_D)
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        b_du = dot(b_dout, tl.trans(b_v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        b_x += tl.sum(tl.where((o_in == SIZE - 1)[None, :], b_s, 0.0), 1) * qk_scale
        m_content = (o_in < SIZE - 1)[None, :]
        b_top = tl.max(tl.where(m_content, b_s, LOWEST), 1) * qk_scale
        b_new_max = tl.maximum(b_block_max, b_top)
        b_p = b_s * qk_scale - b_new_max[:, None]
        b_p = tl.exp2(tl.where(m_content, b_p, float("-inf")))
        b_rescale = tl.exp2(b_block_max - b_new_max)
        b_block_sum = b_block_sum * b_rescale + tl.sum(b_p, 1)
        b_mean = b_mean * b_rescale + tl.sum(b_p * b_du, 1)
        b_block_max = b_new_max
    b_gate = tl.exp2(b_x - b_lse)
    if MASKED:
        b_gate = tl.where(m_visible, b_gate, 0.0)
    return b_block_max + tl.log2(b_block_sum), b_mean / b_block_sum, b_gate


@triton.jit
def _large_grads(
    b_s, b_du, b_inner, b_mean, b_gate, b_delta, o_in, qk_scale,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Return (weights, gradients of scores) of one part of a large block."""
    o_in = o_in[None, :]
    b_p = tl.where(o_in < SIZE - 1, tl.exp2(b_s * qk_scale - b_inner[:, None]), 0.0)
    b_p = b_p * b_gate[:, None]
    b_ds = b_p * (b_du - b_mean[:, None])
    return b_p, tl.where(o_in == SIZE - 1, (b_gate * (b_mean - b_delta))[:, None], b_ds)


@triton.jit
def large_dq(
    b_q, b_dout, b_dq, b_lse, b_delta, p_k, p_v, stride_ks, stride_vs, m_visible, qk_scale,
    SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STEPS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the same as `past_dq` after one large block."""
    b_inner, b_mean, b_gate = _large_stats(
        b_q, b_dout, b_lse, p_k, p_v, stride_ks, stride_vs, m_visible, qk_scale, SIZE, HEAD_DIM,
        BLOCK_D, BLOCK_M, BLOCK_N, STEPS, MASKED,
    )  # fmt: skip
    for i in range(0, STEPS):
        o_in = i * BLOCK_N + tl.arange(0, BLOCK_N)
        o_at = o_in.to(tl.int64)
        b_k = load_rows(p_k, o_at * stride_ks, o_in < SIZE, HEAD_DIM, BLOCK_D)
        b_v = load_rows(p_v, o_at * stride_vs, o_in < SIZE, HEAD_DIM, BLOCK_D)
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        b_du = dot(b_dout, tl.trans(b_v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        _, b_ds = _large_grads(b_s, b_du, b_inner, b_mean, b_gate, b_delta, o_in, qk_scale, SIZE)
        b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq)
    return b_dq


@triton.jit
def large_dkv(
    b_q, b_dout, b_dk, b_dv, b_lse, b_delta, b_k, b_v, o_in, p_k, p_v, stride_ks, stride_vs,
    m_visible, qk_scale,
    SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STEPS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the same as `past_dkv` for part (b_k, b_v, o_in) of the block at p_k and p_v."""
    b_inner, b_mean, b_gate = _large_stats(
        b_q, b_dout, b_lse, p_k, p_v, stride_ks, stride_vs, m_visible, qk_scale, SIZE, HEAD_DIM,
        BLOCK_D, BLOCK_M, BLOCK_N, STEPS, MASKED,
    )  # fmt: skip
    b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    b_du = dot(b_dout, tl.trans(b_v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    b_p, b_ds = _large_grads(b_s, b_du, b_inner, b_mean, b_gate, b_delta, o_in, qk_scale, SIZE)
    b_dv = dot(tl.trans(b_p.to(b_dout.dtype)), b_dout, b_dv)
    b_dk = dot(tl.trans(b_ds.to(b_q.dtype)), b_q, b_dk)
    return b_dk, b_dv
