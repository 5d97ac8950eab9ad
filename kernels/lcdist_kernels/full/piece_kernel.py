"""Full attention's kernels over a work table: many pieces of a sequence in one launch.

The formulas are in `full.kernel`, whose steps these kernels share; the tables are in `full.pieces`.

Shapes: q, out, dout, dq `[b, s, h, d]`; k, v, dk, dv `[b, s, h_kv, d]`; lse2 = lse log2(e) and
delta `[b, h, s]`, by slot; q_lo, q_hi int32 `[rules, s]`, by slot. The grid is (programs, batch). A
row that sees nothing has out = 0, lse2 = -inf. Every result is written once, in its tensor's dtype
and strides, so the order of the programs changes no bit.

Query heads may be columns of a wider tensor, GROUP of every PITCH columns: head h of q is column
h // GROUP PITCH + h % GROUP. They are read where they are.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcdist_kernels.common import positive_scale
from lcdist_kernels.descriptors import make_descriptors, use_descriptors
from lcdist_kernels.full.kernel import dkv_loop
from lcdist_kernels.full.pieces import KeyProgram, Launches, RowProgram, Run, TileSum, WorkTables
from lcdist_kernels.full.tile_configs import (
    BWD_DKV,
    BWD_DKV_HOPPER,
    BWD_DQ,
    BWD_DQ_HOPPER,
    FWD,
    FWD_HOPPER,
)
from lcdist_kernels.softmax_steps import (
    dq_loop,
    finish_softmax,
    fwd_loop,
    load_range,
    loop_sources,
    merge_partials,
    store_delta,
)
from lcdist_kernels.triton_common import (
    LOG2E,
    choose_launch,
    dim_constants,
    last_dim_contiguous,
    launch_context,
    load_tile,
    store_tile,
    strides,
)

ROW_COLUMNS = tl.constexpr(len(RowProgram._fields))
KEY_COLUMNS = tl.constexpr(len(KeyProgram._fields))
RUN_COLUMNS = tl.constexpr(len(Run._fields))
SUM_COLUMNS = tl.constexpr(len(TileSum._fields))


@triton.jit
def _load_rows(programs):
    """Return the columns of this program's `RowProgram` before its range of key tiles."""
    p = programs + tl.program_id(0) * ROW_COLUMNS
    head, key_head = tl.load(p).to(tl.int64), tl.load(p + 1).to(tl.int64)
    row, row_step, rows = tl.load(p + 2).to(tl.int64), tl.load(p + 3).to(tl.int64), tl.load(p + 4)
    slot, limits, start = tl.load(p + 5), tl.load(p + 6), tl.load(p + 7)
    key, key_step, keys = tl.load(p + 8), tl.load(p + 9), tl.load(p + 10)
    return (
        p + 11, head, key_head, row, row_step, rows, slot, limits, start, key, key_step, keys
    )  # fmt: skip


@triton.jit
def _column_of(i_h, GROUP: tl.constexpr, PITCH: tl.constexpr):
    """Return the column of q with query head i_h."""
    return i_h if PITCH == GROUP else i_h // GROUP * PITCH + i_h % GROUP


@triton.jit
def _key_limits(q_lo, q_hi, o_m, m_m, key, key_step, HAS_LO: tl.constexpr):
    """Return the last and the first key that queries o_m see, counted in the keys of a piece.

    The j-th of these is number key + key_step j. Without HAS_LO the second result is never read.
    """
    b_hi = tl.load(q_hi + o_m, mask=m_m, other=-1)
    # Division rounds towards 0: the numerator is positive where any key is visible.
    b_last = (tl.maximum(b_hi, -1) - key + key_step) // key_step - 1
    b_first = b_last
    if HAS_LO:
        b_lo = tl.load(q_lo + o_m, mask=m_m, other=0)
        b_first = (tl.maximum(b_lo - key, 0) + key_step - 1) // key_step
    return b_last, b_first


@triton.jit
def _pieces_fwd_kernel(
    q, k, v, out, lse, lse2,
    q_lo, q_hi, programs,
    qk_scale, seqlen, nheads,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_ob, stride_os, stride_oh,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, MERGE: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    PITCH: tl.constexpr,
):  # fmt: skip
    """Compute out of a tile of rows, and lse2 by slot or lse by row; the other is None.

    MERGE: out and lse hold the partial over other keys, which this one is merged with. STEP: of
    keys, if k and v are descriptors; else 0.
    """
    i_b = tl.program_id(1).to(tl.int64)
    p_range, i_h, i_hk, row, row_step, rows, slot, limits, start, key, key_step, keys = _load_rows(
        programs
    )
    lo, full_lo, full_hi, hi = load_range(p_range, 0)
    i_column = _column_of(i_h, GROUP, PITCH)
    p_q = q + i_b * stride_qb + i_column * stride_qh + row * stride_qs
    k, v, at = loop_sources(
        k, v, i_b, i_hk, key.to(tl.int64), STEP, stride_kb, stride_ks, stride_kh, stride_vb,
        stride_vs, stride_vh, STEP > 0,
    )  # fmt: skip
    step_ks, step_vs = key_step.to(tl.int64) * stride_ks, key_step.to(tl.int64) * stride_vs
    p_out = out + i_b * stride_ob + i_h * stride_oh + row * stride_os

    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    b_q = load_tile(p_q, start, rows, row_step * stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    b_last, b_first = _key_limits(q_lo + limits, q_hi + limits, o_m, m_m, key, key_step, HAS_LO)
    b_out, b_max, b_sum = fwd_loop(
        b_q, k, v, at, lo, full_lo, full_hi, hi, keys, step_ks, step_vs, qk_scale, b_last, b_first,
        None, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, STEP > 0,
    )  # fmt: skip
    b_out, b_lse = finish_softmax(b_out, b_max, b_sum)
    i_row = (i_b * nheads + i_h) * seqlen
    if lse is None:
        tl.store(lse2 + i_row + slot + o_m, b_lse * LOG2E, mask=m_m)
    else:
        p_lse = lse + i_row + row + row_step * o_m
        if MERGE:
            b_before = load_tile(
                p_out, start, rows, row_step * stride_os, BLOCK_M, HEAD_DIM, BLOCK_D, False
            )
            b_lse_before = tl.load(p_lse, mask=m_m, other=float("-inf"))
            b_out, b_lse = merge_partials(b_out, b_lse, b_before.to(tl.float32), b_lse_before)
        tl.store(p_lse, b_lse, mask=m_m)
    store_tile(p_out, b_out, start, rows, row_step * stride_os, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _pieces_bwd_dq_kernel(
    q, k, v, out, dout, lse, lse2, delta, dq,
    q_lo, q_hi, programs,
    softmax_scale, seqlen, nheads,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_ob, stride_os, stride_oh,
    stride_dout_b, stride_dout_s, stride_dout_h, stride_db, stride_ds, stride_dh,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, ADD: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    PITCH: tl.constexpr,
):  # fmt: skip
    """Compute dq of a tile of rows, and delta by slot, which the kernel for dk and dv reads.

    lse: by row, from which lse2 by slot is made here; None: lse2 is there. ADD: to what dq holds.
    STEP: as in `_pieces_fwd_kernel`.
    """
    i_b = tl.program_id(1).to(tl.int64)
    p_range, i_h, i_hk, row, row_step, rows, slot, limits, start, key, key_step, keys = _load_rows(
        programs
    )
    lo, full_lo, full_hi, hi = load_range(p_range, 0)
    i_column = _column_of(i_h, GROUP, PITCH)
    p_q = q + i_b * stride_qb + i_column * stride_qh + row * stride_qs
    k, v, at = loop_sources(
        k, v, i_b, i_hk, key.to(tl.int64), STEP, stride_kb, stride_ks, stride_kh, stride_vb,
        stride_vs, stride_vh, STEP > 0,
    )  # fmt: skip
    step_ks, step_vs = key_step.to(tl.int64) * stride_ks, key_step.to(tl.int64) * stride_vs
    p_out = out + i_b * stride_ob + i_h * stride_oh + row * stride_os
    p_dout = dout + i_b * stride_dout_b + i_h * stride_dout_h + row * stride_dout_s
    p_dq = dq + i_b * stride_db + i_h * stride_dh + row * stride_ds
    i_head = (i_b * nheads + i_h) * seqlen
    i_row = i_head + slot

    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    b_dout, b_delta = store_delta(
        p_out, p_dout, delta + i_row, start, rows, row_step * stride_os, row_step * stride_dout_s,
        HEAD_DIM, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    b_q = load_tile(p_q, start, rows, row_step * stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    # Rows past the end have weights exp(-inf) = 0, masked or not.
    if lse is None:
        b_lse = tl.load(lse2 + i_row + o_m, mask=m_m, other=float("inf"))
    else:
        b_lse = tl.load(lse + i_head + row + row_step * o_m, mask=m_m, other=float("inf")) * LOG2E
        tl.store(lse2 + i_row + o_m, b_lse, mask=m_m)
    b_last, b_first = _key_limits(q_lo + limits, q_hi + limits, o_m, m_m, key, key_step, HAS_LO)
    b_dq, _ = dq_loop(
        b_q, b_dout, b_lse, b_delta, k, v, at, lo, full_lo, full_hi, hi, keys, step_ks, step_vs,
        softmax_scale * LOG2E, b_last, b_first, None, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO,
        STEP > 0, False,
    )  # fmt: skip
    b_dq = b_dq * softmax_scale
    if ADD:
        b_dq += load_tile(
            p_dq, start, rows, row_step * stride_ds, BLOCK_M, HEAD_DIM, BLOCK_D, False
        ).to(tl.float32)
    store_tile(p_dq, b_dq, start, rows, row_step * stride_ds, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _pieces_bwd_dkv_kernel(
    q, k, v, dout, lse2, delta, dk, dv, parts,
    q_lo, q_hi, programs, runs,
    softmax_scale, seqlen, nheads, num_parts,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_dout_b, stride_dout_s, stride_dout_h,
    stride_db, stride_ds, stride_dh,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, EVEN_M: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    PITCH: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of a tile of keys from all rows that see it, or a part of these.

    parts: fp32 `[b, parts, 2, BLOCK_N, BLOCK_D]` for tiles of several programs, or None. STEP: of
    rows, if q and dout are descriptors; else 0, as where heads of q are not adjacent.
    """
    i_b = tl.program_id(1).to(tl.int64)
    p_program = programs + tl.program_id(0) * KEY_COLUMNS
    i_hk, i_first = tl.load(p_program).to(tl.int64), tl.load(p_program + 1).to(tl.int64)
    key, key_step = tl.load(p_program + 2), tl.load(p_program + 3)
    keys, start = tl.load(p_program + 4), tl.load(p_program + 5)
    runs_begin, runs_end = tl.load(p_program + 6), tl.load(p_program + 7)
    first, step = key.to(tl.int64), key_step.to(tl.int64)

    o_n = start + tl.arange(0, BLOCK_N)
    p_k = k + i_b * stride_kb + i_hk * stride_kh + first * stride_ks
    p_v = v + i_b * stride_vb + i_hk * stride_vh + first * stride_vs
    b_k = load_tile(p_k, start, keys, step * stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    b_v = load_tile(p_v, start, keys, step * stride_vs, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    b_k_idx = tl.where(o_n < keys, key + key_step * o_n, 2147483647)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    qk_scale = softmax_scale * LOG2E
    for i_run in range(runs_begin, runs_end):
        p = runs + i_run * RUN_COLUMNS
        head, heads, row = tl.load(p), tl.load(p + 1), tl.load(p + 2).to(tl.int64)
        row_step, rows = tl.load(p + 3).to(tl.int64), tl.load(p + 4)
        slot, limits = tl.load(p + 5), tl.load(p + 6)
        lo, full_lo, full_hi, hi = load_range(p + 7, 0)
        for i_g in range(0, heads):
            i_h = i_first + head + i_g
            i_row = (i_b * nheads + i_h) * seqlen + slot
            i_more = _column_of(i_h, GROUP, PITCH) - i_h
            q_head = q if PITCH == GROUP else q + i_more * stride_qh
            of_q, of_dout, at = loop_sources(
                q_head, dout, i_b, i_h, row, STEP, stride_qb, stride_qs, stride_qh, stride_dout_b,
                stride_dout_s, stride_dout_h, STEP > 0,
            )  # fmt: skip
            b_dk, b_dv = dkv_loop(
                b_k, b_v, b_dk, b_dv, of_q, of_dout, at, lse2 + i_row, delta + i_row, lo, full_lo,
                full_hi, hi, rows, row_step * stride_qs, row_step * stride_dout_s, qk_scale,
                q_hi + limits, q_lo + limits, b_k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO,
                EVEN_M, STEP > 0,
            )  # fmt: skip
    b_dk = b_dk * softmax_scale
    if parts is not None:
        part = tl.load(p_program + 8)
        if part >= 0:
            p_part = parts + (i_b * num_parts + part) * 2 * BLOCK_N * BLOCK_D
            o_part = tl.arange(0, BLOCK_N)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
            tl.store(p_part + o_part, b_dk)
            tl.store(p_part + BLOCK_N * BLOCK_D + o_part, b_dv)
            # The tile is another kernel's: no key is below 0.
            keys = 0
    o_own = i_b * stride_db + i_hk * stride_dh + first * stride_ds
    store_tile(dk + o_own, b_dk, start, keys, step * stride_ds, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_tile(dv + o_own, b_dv, start, keys, step * stride_ds, BLOCK_N, HEAD_DIM, BLOCK_D)


@triton.jit
def _pieces_sum_kernel(
    parts, dk, dv, sums,
    num_parts,
    stride_db, stride_ds, stride_dh,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the parts of dk and dv of a tile of keys, in order."""
    i_b = tl.program_id(1).to(tl.int64)
    p_sum = sums + tl.program_id(0) * SUM_COLUMNS
    i_hk, key, step = (
        tl.load(p_sum).to(tl.int64), tl.load(p_sum + 1).to(tl.int64), tl.load(p_sum + 2)
    )  # fmt: skip
    keys, start = tl.load(p_sum + 3), tl.load(p_sum + 4)
    parts_begin, parts_end = tl.load(p_sum + 5), tl.load(p_sum + 6)
    o_part = tl.arange(0, BLOCK_N)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(parts_begin, parts_end):
        p_part = parts + (i_b * num_parts + i) * 2 * BLOCK_N * BLOCK_D
        b_dk += tl.load(p_part + o_part)
        b_dv += tl.load(p_part + BLOCK_N * BLOCK_D + o_part)
    o_own = i_b * stride_db + i_hk * stride_dh + key * stride_ds
    step_ds = step.to(tl.int64) * stride_ds
    store_tile(dk + o_own, b_dk, start, keys, step_ds, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_tile(dv + o_own, b_dv, start, keys, step_ds, BLOCK_N, HEAD_DIM, BLOCK_D)


class Queries(NamedTuple):
    """Query heads that are columns of a tensor, as kernels read them.

    Attributes:
        x: `[b, s, columns, d]`, a view.
        nheads: number of query heads.
        group, pitch: head h is column h // group * pitch + h % group.
    """

    x: Tensor
    nheads: int
    group: int = 1
    pitch: int = 1

    @classmethod
    def of(cls, q: Tensor) -> "Queries":
        """Return the heads of q `[b, s, h, d]`, or `[b, s, h / g, g, d]`, without a copy.

        A copy is made where neither the last stride is 1 nor one head stride divides the other.
        """
        if q.dim() == 4:
            return cls(last_dim_contiguous(q), q.shape[2])
        *_, number, group, head_dim = q.shape
        if group == 1:
            return cls(last_dim_contiguous(q[:, :, :, 0]), number)
        q, heads = last_dim_contiguous(q), number * group
        outer, inner = q.stride()[2:4]
        if not q.numel() or inner <= 0 or outer % inner or outer < inner * group:
            return cls(last_dim_contiguous(q.flatten(2, 3)), heads)
        columns, pitch = outer // inner * (number - 1) + group, outer // inner
        shape = (*q.shape[:2], columns, head_dim)
        return cls(q.as_strided(shape, (*q.stride()[:2], inner, 1)), heads, group, pitch)

    @property
    def constants(self) -> dict[str, int]:
        """Return the kernels' constants."""
        adjacent = self.group == self.pitch
        return {
            **dim_constants(self.x),
            "GROUP": 1 if adjacent else self.group,
            "PITCH": 1 if adjacent else self.pitch,
        }


def launches_for(q: Tensor, k: Tensor, v: Tensor) -> tuple[Launches, Launches | None]:
    """Return the tiles of full attention: by pointers, and by descriptors where tensors fit."""
    fwd = choose_launch(FWD, q, FWD_HOPPER)
    by_pointers = Launches(fwd, choose_launch(BWD_DQ, q), choose_launch(BWD_DKV, q))
    if not use_descriptors(k, v):
        return by_pointers, None
    dq, dkv = choose_launch(BWD_DQ, q, BWD_DQ_HOPPER), choose_launch(BWD_DKV, q, BWD_DKV_HOPPER)
    return by_pointers, Launches(fwd, dq, dkv)


def _sources(step: int, block: int, x: Tensor, y: Tensor) -> tuple[int, Sequence[Any]]:
    """Return STEP of a kernel, and x and y or their descriptors."""
    if step and use_descriptors(x, y, step=step):
        return step, make_descriptors(block, x, y, step=step)
    return 0, (x, y)


def pieces_fwd(
    q: Tensor, k: Tensor, v: Tensor, tables: WorkTables, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Return out like q `[b, s, h, d]`, and lse2 fp32 `[b, h, s]` for `pieces_bwd`.

    q, k, v: tensors that kernels take, with at least one token; k, v `[b, s, h_kv, d]`.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse2 = torch.empty((len(q), q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    _fwd(q, k, v, tables, softmax_scale, out, None, lse2)
    return out, lse2


def partial_fwd(
    q: Tensor, k: Tensor, v: Tensor, tables: WorkTables, softmax_scale: float,
    partial: tuple[Tensor, Tensor], *, merge: bool,
) -> None:  # fmt: skip
    """Write the partial of q over k to (out `[b, s, h, d]`, lse fp32 `[b, h, s]`).

    q: as `Queries.of` takes it. k, v: `[b, s_k, h_k, d]`. merge: with the partial over other keys
    that is there.
    """
    if tables.fwd.numel():
        _fwd(q, k, v, tables, softmax_scale, *partial, None, merge=merge)


def _fwd(
    q: Tensor, k: Tensor, v: Tensor, tables: WorkTables, softmax_scale: float, out: Tensor,
    lse: Tensor | None, lse2: Tensor | None, *, merge: bool = False,
) -> None:  # fmt: skip
    q, softmax_scale = positive_scale(q, softmax_scale)
    queries = Queries.of(q)
    q, k, v = queries.x, last_dim_contiguous(k), last_dim_contiguous(v)
    step, keys = _sources(tables.key_step, tables.launches.fwd.block_n, k, v)
    with launch_context(q):
        _pieces_fwd_kernel[(len(tables.fwd), len(q))](
            q, *keys, out, lse, lse2, tables.q_lo, tables.q_hi, tables.fwd,
            softmax_scale * LOG2E.value, q.shape[1], queries.nheads, *strides(q, k, v, out),
            **queries.constants, HAS_LO=tables.has_lo, MERGE=merge, STEP=step,
            **tables.launches.fwd.options(),
        )  # fmt: skip


def pieces_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse2: Tensor, tables: WorkTables,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dq, dk, dv) of `pieces_fwd`, in the dtype of q."""
    dq, dk, dv = grads = tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)
    )
    _bwd(dout, q, k, v, out, None, lse2, tables, softmax_scale, grads)
    return dq, dk, dv


def partial_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tables: WorkTables,
    softmax_scale: float, grads: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Add the share of dq that passes through k to dq, and write that of dk and dv.

    dout: like out. q: as `Queries.of` takes it. out, lse: of the whole rows, as `partial_fwd`.
    grads: dq, like out, dk and dv, in any floating dtype.
    """
    _bwd(dout, q, k, v, out, lse, torch.empty_like(lse), tables, softmax_scale, grads, add=True)


def _bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, lse2: Tensor,
    tables: WorkTables, softmax_scale: float, grads: tuple[Tensor, ...], *, add: bool = False,
) -> None:  # fmt: skip
    k, v, out, dout = (last_dim_contiguous(x) for x in (k, v, out, dout.to(q.dtype)))
    queries = Queries.of(q)
    q, batch = queries.x, len(q)
    dq, dk, dv = grads
    delta = torch.empty_like(lse2)
    numbers = (float(softmax_scale), q.shape[1], queries.nheads)
    sizes = queries.constants | {"HAS_LO": tables.has_lo}
    limits, launches = (tables.q_lo, tables.q_hi), tables.launches
    tile = (launches.dkv.block_n, sizes["BLOCK_D"])
    parts = lse2.new_empty((batch, tables.num_parts, 2, *tile)) if tables.num_parts else None
    key_step, keys = _sources(tables.key_step, launches.dq.block_n, k, v)
    # A descriptor of q would need other coordinates than that of dout.
    step = tables.row_step if sizes["PITCH"] == 1 else 0
    row_step, rows = _sources(step, launches.dkv.block_m, q, dout)
    with launch_context(q):
        if tables.dq.numel():
            _pieces_bwd_dq_kernel[(len(tables.dq), batch)](
                q, *keys, out, dout, lse, lse2, delta, dq, *limits, tables.dq, *numbers,
                *strides(q, k, v, out, dout, dq), **sizes, ADD=add, STEP=key_step,
                **launches.dq.options(),
            )  # fmt: skip
        _pieces_bwd_dkv_kernel[(len(tables.dkv), batch)](
            rows[0], k, v, rows[1], lse2, delta, dk, dv, parts, *limits, tables.dkv, tables.runs,
            *numbers, tables.num_parts, *strides(q, k, v, dout, dk), **sizes, EVEN_M=tables.even_m,
            STEP=row_step, **launches.dkv.options(),
        )  # fmt: skip
        if parts is not None:
            _pieces_sum_kernel[(len(tables.sums), batch)](
                parts, dk, dv, tables.sums, tables.num_parts, *strides(dk), **dim_constants(q),
                BLOCK_N=launches.dkv.block_n,
            )  # fmt: skip
