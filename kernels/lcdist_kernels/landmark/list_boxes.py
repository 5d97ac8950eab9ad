"""Loops over lists of past blocks, and over own ones, that come by tensor descriptors.

An entry of a list is one box of SIZE rows. A tile of keys is two entries with products of their
own, as boxes from two places in memory cannot be joined without going through registers. The
formulas are in `block_gates`, lists and entries in `sparse_kernel`.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

from lcdist_kernels.landmark.inner_loop import block_softmax, grads_of_gates
from lcdist_kernels.softmax_steps import hide_keys, is_visible, load_key_numbers, weigh
from lcdist_kernels.triton_common import LOWEST, dot, load_box, reciprocal

NEVER = tl.constexpr(2147483647)


@triton.jit
def begin_of(begins, b_id, SIZE: tl.constexpr, LOCAL: tl.constexpr):
    """Return the first slot of entries; after every query for -1."""
    if LOCAL:
        b_begin = tl.where(b_id >= 0, b_id * SIZE, NEVER)
    else:
        b_begin = tl.load(begins + b_id, mask=b_id >= 0, other=NEVER)
    return b_begin


@triton.jit
def reads(b_member, o_s, CHUNK: tl.constexpr):
    """Return whether rows o_s read entries with these bits, of a chunk of CHUNK rows."""
    return ((b_member >> (o_s % CHUNK).to(tl.int32)) & 1) != 0


@triton.jit
def _load_entry(x, i_b, i_hk, i_e, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, LOCAL: tl.constexpr):
    """Return the rows of entry i_e, `[SIZE, BLOCK_D]`: block i_e of a key head, or of a table."""
    if LOCAL:
        b = load_box(x, (i_b.to(tl.int32), 0, 0, i_hk.to(tl.int32)), i_e * SIZE, SIZE, BLOCK_D)
    else:
        b = load_box(x, (i_e, 0, 0, 0), 0, SIZE, BLOCK_D)
    return b


@triton.jit
def _entry(
    p_ids, p_members, begins, i, stop, b_q_last, o_s,
    SIZE: tl.constexpr, LOCAL: tl.constexpr, CHUNK: tl.constexpr, WITHIN: tl.constexpr,
):  # fmt: skip
    """Return (entry, which rows see it) of place i of a list; for -1 it is 0, which none sees.

    WITHIN: i < stop; else what comes after the last entry is the last again, which none sees.
    """
    at = i if WITHIN else tl.minimum(i, stop - 1)
    i_e = tl.load(p_ids + at)
    # There is no -1 among the entries of a chunk.
    begin = i_e * SIZE if CHUNK > 0 else begin_of(begins, i_e, SIZE, LOCAL)
    if not WITHIN:
        begin = tl.where(i < stop, begin, NEVER)
    m_visible = begin <= b_q_last
    if CHUNK > 0:
        m_visible = m_visible & reads(tl.load(p_members + at), o_s, CHUNK)
    else:
        i_e = tl.maximum(i_e, 0)
    return i_e, m_visible


@triton.jit
def _scores(
    b_q, x, i_b, i_hk, i_e,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Return (q . x, x) of an entry."""
    b_x = _load_entry(x, i_b, i_hk, i_e, SIZE, BLOCK_D, LOCAL)
    return dot(b_q, tl.trans(b_x), tl.zeros([BLOCK_M, SIZE], tl.float32)), b_x


@triton.jit
def _add_values(
    b_out, b_p, b_factor, v, i_b, i_hk, i_e,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Return out after the values of an entry, from its softmax and the factor of its block."""
    b_v = _load_entry(v, i_b, i_hk, i_e, SIZE, BLOCK_D, LOCAL)
    return dot((b_p * b_factor[:, None]).to(b_v.dtype), b_v, b_out)


@triton.jit
def _entry_softmax(b_s, m_visible, qk_scale, SIZE: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return (softmax, its sum, the landmark's score) of an entry; -inf for rows that see none."""
    o_in = tl.arange(0, SIZE)
    b_p, b_block_sum, b_x = block_softmax(b_s, o_in, qk_scale, SIZE, BLOCK_M, 1, SIZE)
    return b_p, tl.sum(b_block_sum, 1), tl.where(m_visible, tl.sum(b_x, 1), float("-inf"))


@triton.jit
def list_fwd(
    b_q, k, v, i_b, i_hk, p_ids, p_members, begins, stop, b_q_last, o_s, qk_scale,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, LOCAL: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Return (out, max, sum) after a list of `stop` places, two of them a step.

    Values are added one step later, while the next step's softmax is computed, as in
    `softmax_steps.fwd_loop`. Names with 1 are of the second entry.
    """
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_rescale = tl.zeros([BLOCK_M], tl.float32)
    b_p = tl.zeros([BLOCK_M, SIZE], tl.float32)
    b_factor = tl.zeros([BLOCK_M], tl.float32)
    b_p1, b_factor1 = b_p, b_factor
    last, last1 = 0, 0
    for i in range(0, stop, 2):
        i_e, m_see = _entry(
            p_ids, p_members, begins, i, stop, b_q_last, o_s, SIZE, LOCAL, CHUNK, True
        )
        b_s, _ = _scores(b_q, k, i_b, i_hk, i_e, SIZE, BLOCK_D, BLOCK_M, LOCAL)
        i_e1, m_see1 = _entry(
            p_ids, p_members, begins, i + 1, stop, b_q_last, o_s, SIZE, LOCAL, CHUNK, False
        )
        b_s1, _ = _scores(b_q, k, i_b, i_hk, i_e1, SIZE, BLOCK_D, BLOCK_M, LOCAL)
        b_out = b_out * b_rescale[:, None]
        b_out = _add_values(b_out, b_p, b_factor, v, i_b, i_hk, last, SIZE, BLOCK_D, LOCAL)
        b_out = _add_values(b_out, b_p1, b_factor1, v, i_b, i_hk, last1, SIZE, BLOCK_D, LOCAL)
        b_p, b_block_sum, b_x = _entry_softmax(b_s, m_see, qk_scale, SIZE, BLOCK_M)
        b_p1, b_block_sum1, b_x1 = _entry_softmax(b_s1, m_see1, qk_scale, SIZE, BLOCK_M)
        b_new = tl.maximum(tl.maximum(b_max, b_x), b_x1)
        b_gate, b_gate1 = tl.exp2(b_x - b_new), tl.exp2(b_x1 - b_new)
        b_factor = b_gate * reciprocal(b_block_sum)
        b_factor1 = b_gate1 * reciprocal(b_block_sum1)
        b_rescale = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_rescale + (b_gate + b_gate1)
        b_max, last, last1 = b_new, i_e, i_e1
    if stop > 0:
        b_out = b_out * b_rescale[:, None]
        b_out = _add_values(b_out, b_p, b_factor, v, i_b, i_hk, last, SIZE, BLOCK_D, LOCAL)
        b_out = _add_values(b_out, b_p1, b_factor1, v, i_b, i_hk, last1, SIZE, BLOCK_D, LOCAL)
    return b_out, b_max, b_sum


@triton.jit
def own_block_fwd(
    b_q, k, v, b_out, b_max, b_sum, i_b, i_hk, lo, hi, seqlen_k, qk_scale, b_own_last, b_own_lo,
    k_idx, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Return (out, max, sum) after blocks lo to hi, where each key is an entry."""
    for i in range(lo, hi):
        b_s, _ = _scores(b_q, k, i_b, i_hk, i, SIZE, BLOCK_D, BLOCK_M, True)
        b_v = _load_entry(v, i_b, i_hk, i, SIZE, BLOCK_D, True)
        b_s = hide_keys(b_s, i * SIZE, seqlen_k, b_own_last, b_own_lo, k_idx, SIZE, True)
        b_p, b_rescale, b_max, b_sum = weigh(b_s, b_max, b_sum, qk_scale)
        b_out = dot(b_p.to(b_v.dtype), b_v, b_out * b_rescale[:, None])
    return b_out, b_max, b_sum


@triton.jit
def _entry_grads(
    b_s, b_du, b_lse, b_delta, m_visible, qk_scale, SIZE: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Return the gradients of an entry's scores."""
    o_in = tl.arange(0, SIZE)
    b_p, b_block_sum, b_x = block_softmax(b_s, o_in, qk_scale, SIZE, BLOCK_M, 1, SIZE)
    b_gate = tl.where(m_visible[:, None], tl.exp2(b_x - b_lse[:, None]), 0.0)
    _, b_ds = grads_of_gates(b_p, b_block_sum, b_gate, b_du, b_delta, o_in, SIZE, BLOCK_M, 1, SIZE)
    return b_ds


@triton.jit
def list_dq(
    b_q, b_dout, b_lse, b_delta, k, v, i_b, i_hk, p_ids, p_members, begins, stop, b_q_last, o_s,
    qk_scale,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, LOCAL: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Return dq, without softmax_scale, after a list, as `list_fwd`."""
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(0, stop, 2):
        i_e, m_see = _entry(
            p_ids, p_members, begins, i, stop, b_q_last, o_s, SIZE, LOCAL, CHUNK, True
        )
        b_k = _load_entry(k, i_b, i_hk, i_e, SIZE, BLOCK_D, LOCAL)
        b_v = _load_entry(v, i_b, i_hk, i_e, SIZE, BLOCK_D, LOCAL)
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, SIZE], tl.float32))
        i_e1, m_see1 = _entry(
            p_ids, p_members, begins, i + 1, stop, b_q_last, o_s, SIZE, LOCAL, CHUNK, False
        )
        b_k1 = _load_entry(k, i_b, i_hk, i_e1, SIZE, BLOCK_D, LOCAL)
        b_v1 = _load_entry(v, i_b, i_hk, i_e1, SIZE, BLOCK_D, LOCAL)
        b_s1 = dot(b_q, tl.trans(b_k1), tl.zeros([BLOCK_M, SIZE], tl.float32))
        # The products of values come after all those of keys: another order costs spills.
        b_du = dot(b_dout, tl.trans(b_v), tl.zeros([BLOCK_M, SIZE], tl.float32))
        b_du1 = dot(b_dout, tl.trans(b_v1), tl.zeros([BLOCK_M, SIZE], tl.float32))
        b_ds = _entry_grads(b_s, b_du, b_lse, b_delta, m_see, qk_scale, SIZE, BLOCK_M)
        b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq)
        b_ds = _entry_grads(b_s1, b_du1, b_lse, b_delta, m_see1, qk_scale, SIZE, BLOCK_M)
        b_dq = dot(b_ds.to(b_k1.dtype), b_k1, b_dq)
    return b_dq


@triton.jit
def own_block_dq(
    b_q, b_dout, b_dq, b_lse, b_delta, k, v, i_b, i_hk, lo, hi, seqlen_k, qk_scale, b_own_last,
    b_own_lo, k_idx, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Return dq, without softmax_scale, after blocks lo to hi, where each key is an entry."""
    for i in range(lo, hi):
        b_s, b_k = _scores(b_q, k, i_b, i_hk, i, SIZE, BLOCK_D, BLOCK_M, True)
        b_k_idx = load_key_numbers(k_idx, i * SIZE + tl.arange(0, SIZE), seqlen_k)
        m_s = is_visible(b_own_last[:, None], b_own_lo[:, None], b_k_idx[None, :], True)
        # Masked after the exponential: a row that saw nothing anywhere has lse = -inf.
        b_p = tl.where(m_s, tl.exp2(b_s * qk_scale - b_lse[:, None]), 0.0)
        b_du, _ = _scores(b_dout, v, i_b, i_hk, i, SIZE, BLOCK_D, BLOCK_M, True)
        b_ds = b_p * (b_du - b_delta[:, None])
        b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq)
    return b_dq
