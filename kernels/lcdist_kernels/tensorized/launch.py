"""Launches of tensorized attention's kernels: the operators of `tiled` for bf16, fp16 and fp32."""
# What a kernel's arguments are, `tl.constexpr` decides, which is no type to Python's checkers.
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lcdist_kernels.tensorized.bwd_kernel import (
    _tensorized_bwd_dkv_kernel,
    _tensorized_bwd_dq_kernel,
)
from lcdist_kernels.tensorized.kernel import _row_dot_kernel, _tensorized_fwd_kernel
from lcdist_kernels.tensorized.tile_configs import BWD_DKV, BWD_DQ, FWD
from lcdist_kernels.tensorized.tiled import (
    Band,
    Branch,
    Fibres,
    Grads,
    ModeRotary,
    Partial,
    hop_queries,
    hop_queries_bwd,
    past_band,
)
from lcdist_kernels.tile_ranges import (
    DeviceStream,
    Indices,
    band_of,
    bounded_below,
    device_stream,
    key_ranges,
    on_device,
    query_ranges,
)
from lcdist_kernels.triton_common import (
    LOG2E,
    Launch,
    LaunchTable,
    check_kernel,
    choose_launch,
    last_dim_contiguous,
    launch_context,
    padded,
    strides,
)

ROW_DOT_BLOCK = 32


class Sweep(NamedTuple):
    """Fibres, what a branch sees of them (None: there is none), and whether a hop goes along.

    before, after: whole blocks that each block's branch sees before its own, and in how many after
    its own it is seen; empty where branches stay inside fibres.
    """

    size_q: int
    size_k: int
    stride: int
    outers: int
    band: Band | None
    hop: bool
    before: Tensor
    after: Tensor

    @property
    def flags(self) -> dict[str, bool]:
        """What kernels are compiled for."""
        return {"BRANCH": self.band is not None, "HOP": self.hop}

    def sizes(self, launched: Launch, side: int) -> tuple[int, int]:
        """(how many tiles all fibres of one sequence have, tiles) of queries (0) or keys (1)."""
        tiles = triton.cdiv(self[side], launched[side])
        return tiles * self.stride * self.outers, tiles

    def tables(
        self, launched: Launch, place: DeviceStream, x: Tensor, of_keys: bool
    ) -> list[Tensor]:
        """q_idx, q_lo, k_idx, ranges and before or after; x where there is nothing to tell."""
        block_m, block_n = launched.block_m, launched.block_n
        if self.band is None:
            return [x, x, on_device(Indices(torch.arange(self.size_k)), place), x, x]
        band = band_of(*self.band)
        ranges = (query_ranges if of_keys else key_ranges)(band, block_m, block_n, place)
        blocks = self.after if of_keys else self.before
        k_idx = band.k_idx
        if len(blocks):
            # Rows of blocks before are counted from 0 as well.
            k_idx = Indices(torch.arange(self.size_k * max(1, int(blocks.max()))))
        return [
            on_device(band.q_idx, place),
            on_device(band.q_lo, place),
            on_device(k_idx, place),
            ranges,
            on_device(Indices(blocks), place) if len(blocks) else x,
        ]


NONE = torch.empty(0, dtype=torch.int64)


def sweep_of(q: Tensor, k: Tensor, branch: Branch | None, hop: Fibres | None) -> Sweep:
    """The sweep of a branch and a hop of the same mode; a branch over a run of tokens is cut to
    fibres of the hop, and what it sees before them is counted in their size.
    """
    seqlen = q.shape[1]
    if branch is None:
        assert hop is not None, "a sweep is of a branch or a hop"
        outers = seqlen // (hop.size * hop.stride)
        return Sweep(hop.size, hop.size, hop.stride, outers, None, True, NONE, NONE)
    if branch.fibres is not None:
        size, stride = branch.fibres.size, branch.fibres.stride
        outers = seqlen // (size * stride)
        return Sweep(size, size, stride, outers, branch.band, hop is not None, NONE, NONE)
    if hop is None:
        return Sweep(seqlen, k.shape[1], 1, 1, branch.band, False, NONE, NONE)
    size, outers = hop.size, seqlen // hop.size
    first, lo = (x[::size].contiguous() for x in branch.band[:2])
    after = torch.searchsorted(lo, first, right=True) - 1 - torch.arange(outers)
    before = (first - lo) // size
    return Sweep(size, size, 1, outers, past_band(size, 0), True, before, after)


def shared(hop: bool, q: Tensor, k: Tensor, turning: ModeRotary) -> bool:
    """Whether hop and branch have the same queries."""
    return hop and (turning.grid.hop_heads == "q" or q.shape[2] == k.shape[2])


def mode_fwd(
    qku: Sequence[Tensor],
    branch: Branch,
    mode: int,
    turning: ModeRotary,
    so_far: Partial | None,
    bias: Tensor,
) -> tuple[Partial, Tensor | None, Tensor | None]:
    """As the tiled `mode_fwd`; where a hop has a query for each query head, in one sweep."""
    grid, last = turning.grid, mode == len(turning.grid.modes)
    q, k, u = qku
    if not q.numel():
        raise ValueError(f"q of shape {tuple(q.shape)}: kernels need at least one element")
    together = shared(not last, q, k, turning)
    fibres = None if last else Fibres(grid.modes[mode], grid.strides[mode])
    sweep = sweep_of(q, k, branch, fibres if together else None)
    merged = None if so_far is None else (so_far, bias[mode - 1])
    done, hopped, lam = _fwd(
        qku, sweep, turning.softmax_scale, merged, q.dtype if last else torch.float32
    )
    assert done is not None, "a sweep with a branch has a partial"
    if not last and not together:
        hopped, lam = hop_fwd(q, k, u, mode, turning)
    return done, hopped, lam


def mode_bwd(
    dout: Tensor, qku: Sequence[Tensor], rows_: tuple[Tensor, Tensor], branch: Branch,
    hopped: Sequence[Tensor] | None, mode: int, turning: ModeRotary,
) -> Grads:  # fmt: skip
    """As the tiled `mode_bwd`."""
    q, k, _ = qku
    grid, scale = turning.grid, turning.softmax_scale
    if hopped is None or not shared(True, q, k, turning):
        grads = branch_bwd(dout, qku, rows_, branch, scale)
        if hopped is not None:
            more = hop_bwd(hopped[0], qku, hopped[1:], mode, turning)
            for total, one in zip(grads[:3], more, strict=True):
                total += one
        return grads
    fibres = Fibres(grid.modes[mode], grid.strides[mode])
    return _bwd(qku, sweep_of(q, k, branch, fibres), scale, (dout, *rows_), hopped)


def branch_fwd(qku: Sequence[Tensor], branch: Branch, softmax_scale: float) -> Partial:
    """As the tiled `branch_fwd`."""
    q, k, _ = qku
    if not q.numel():
        out = q.new_zeros(q.shape, dtype=torch.float32)
        return Partial(out, out.new_empty(q.shape[0], q.shape[2], q.shape[1]))
    sweep = sweep_of(q, k, branch, None)
    done = _fwd(qku, sweep, softmax_scale, None, torch.float32)[0]
    assert done is not None, "a sweep with a branch has a partial"
    return done


def branch_bwd(
    dout: Tensor,
    qku: Sequence[Tensor],
    rows_: tuple[Tensor, Tensor],
    branch: Branch,
    softmax_scale: float,
) -> Grads:
    """As the tiled `branch_bwd`."""
    q, k, _ = qku
    return _bwd(qku, sweep_of(q, k, branch, None), softmax_scale, (dout, *rows_), None)


def hop_fwd(
    q: Tensor, k: Tensor, u: Tensor, mode: int, turning: ModeRotary
) -> tuple[Tensor, Tensor]:
    """As the tiled `hop_fwd`; lambda_j is `[b, h, s]`, a mean query rounded to q.dtype."""
    grid = turning.grid
    q = hop_queries(q, k.shape[2], grid).to(k.dtype)
    sweep = sweep_of(q, k, None, Fibres(grid.modes[mode], grid.strides[mode]))
    _, hopped, lam = _fwd((q, k, u), sweep, turning.softmax_scale, None, torch.float32)
    assert hopped is not None and lam is not None, "a sweep with a hop has a U"
    return hopped, lam


def hop_bwd(
    g: Tensor, qku: Sequence[Tensor], hopped: Sequence[Tensor], mode: int, turning: ModeRotary
) -> tuple[Tensor, Tensor, Tensor]:
    """As the tiled `hop_bwd`; lambda_j as `hop_fwd` gave it."""
    (q, k, u), grid, nheads = qku, turning.grid, qku[0].shape[2]
    q = hop_queries(q, k.shape[2], grid).to(k.dtype)
    sweep = sweep_of(q, k, None, Fibres(grid.modes[mode], grid.strides[mode]))
    grads = _bwd((q, k, u), sweep, turning.softmax_scale, None, (g, *hopped))
    return hop_queries_bwd(grads.dq, nheads), grads.dk, grads.du


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """dout . out of every row: `[b, s, h, d]` -> `[b, h, s]` in fp32."""
    dout, out = last_dim_contiguous(dout), last_dim_contiguous(out)
    batch, seqlen, nheads, head_dim = out.shape
    total = torch.empty((batch, nheads, seqlen), dtype=torch.float32, device=out.device)
    if not out.numel():
        return total.zero_()
    with launch_context(out):
        _row_dot_kernel[(triton.cdiv(seqlen, ROW_DOT_BLOCK), nheads, batch)](
            dout, out, total, seqlen, *strides(dout, out), HEAD_DIM=head_dim,
            BLOCK_D=padded(head_dim), BLOCK_S=ROW_DOT_BLOCK,
        )  # fmt: skip
    return total


def _launch(table: LaunchTable, q: Tensor, sweep: Sweep) -> Launch:
    """The table's tiles, no larger than fibres need; a product has at least 16 rows."""
    launched = choose_launch(table, q)
    most = [max(16, triton.next_power_of_2(size)) for size in sweep[:2]]
    block_m, block_n = min(launched.block_m, most[0]), min(launched.block_n, most[1])
    small = block_m * block_n < 64 * 32
    return launched._replace(
        block_m=block_m, block_n=block_n, num_warps=4 if small else launched.num_warps
    )


def _sizes(q: Tensor, k: Tensor, u: Tensor, sweep: Sweep) -> dict[str, Any]:
    nheads, head_dim = q.shape[2:]
    return {
        "GROUP_K": nheads // k.shape[2],
        "GROUP_U": nheads // u.shape[2],
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded(head_dim),
        "HAS_LO": sweep.band is not None and bounded_below(band_of(*sweep.band)),
        **sweep.flags,
    }


def _fwd(
    qku: Sequence[Tensor],
    sweep: Sweep,
    softmax_scale: float,
    merged: tuple[Partial, Tensor] | None,
    out_dtype: torch.dtype,
) -> tuple[Partial | None, Tensor | None, Tensor | None]:
    """(the branch's partial, merged if asked, U, lambda), None for what the sweep has none of.

    merged: the partial of finer branches, whose memory an fp32 one takes over, and the bias `[h]`.
    """
    q, k, u = (last_dim_contiguous(x) for x in qku)
    check_kernel(q)
    if softmax_scale < 0:
        q, softmax_scale = -q, -softmax_scale
    batch, seqlen, nheads, _ = q.shape
    done, hopped, lam = None, None, None
    if sweep.band is not None:
        if merged is not None and out_dtype == merged[0].out.dtype:
            done = merged[0]
        else:
            out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
            done = Partial(out, _rows_like(q))
    if sweep.hop:
        hopped, lam = torch.empty(q.shape, dtype=u.dtype, device=q.device), _rows_like(q)
    launched, place = _launch(FWD, q, sweep), device_stream(q)
    before, bias = merged or (None, None)
    outs = [*(done or (q, q)), *((q, q) if hopped is None else (hopped, lam))]
    with launch_context(q):
        _tensorized_fwd_kernel[(sweep.sizes(launched, 0)[0] * nheads * batch,)](
            q, k, u, *(before or (q, q)), *outs, q if bias is None else bias.contiguous(),
            *sweep.tables(launched, place, q, of_keys=False), softmax_scale * LOG2E.value,
            sweep.size_q, sweep.size_k, sweep.stride, sweep.outers, nheads, seqlen,
            *strides(q, k, u, before.out if before else q, outs[0], outs[2]),
            **_sizes(q, k, u, sweep), MERGE=merged is not None,
            BEFORE=bool(len(sweep.before) and sweep.before.any()), **launched.options(),
        )  # fmt: skip
    return done, hopped, lam


def _rows_like(q: Tensor) -> Tensor:
    batch, seqlen, nheads, _ = q.shape
    return torch.empty((batch, nheads, seqlen), dtype=torch.float32, device=q.device)


def _bwd(
    qku: Sequence[Tensor],
    sweep: Sweep,
    softmax_scale: float,
    branch: tuple[Tensor, Tensor, Tensor] | None,
    hop: Sequence[Tensor] | None,
) -> Grads:
    """The gradients of a sweep in fp32. branch: dout, lse less bias, delta; hop: dU, U, lambda."""
    q, k, u = (last_dim_contiguous(x) for x in qku)
    check_kernel(q)
    batch, seqlen, nheads, _ = q.shape
    dq, dk, du = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, u))
    dlogits = _rows_like(q)
    if not q.numel():
        return Grads(dq, dk, du, dlogits)
    dout, lse, delta, g, lam, gamma = [q] * 6
    if branch is not None:
        dout = last_dim_contiguous(branch[0].to(q.dtype))
        lse, delta = (x.float().contiguous() for x in branch[1:])
    if hop is not None:
        g, lam = last_dim_contiguous(hop[0].to(q.dtype)), hop[2].contiguous()
        gamma = row_delta(g, hop[1])
    place, sizes = device_stream(q), _sizes(q, k, u, sweep)
    numbers = [
        float(softmax_scale),
        sweep.size_q,
        sweep.size_k,
        sweep.stride,
        sweep.outers,
    ]
    inputs = strides(q, k, u, dout, g)
    given = [q, k, u, dout, g, lse, delta, lam, gamma]
    with launch_context(q):
        launched = _launch(BWD_DQ, q, sweep)
        _tensorized_bwd_dq_kernel[(sweep.sizes(launched, 0)[0] * nheads * batch,)](
            *given, dq, dlogits, *sweep.tables(launched, place, q, of_keys=False), *numbers, nheads,
            seqlen, *inputs, *strides(dq), **sizes,
            BEFORE=bool(len(sweep.before) and sweep.before.any()), **launched.options(),
        )  # fmt: skip
        launched = _launch(BWD_DKV, q, sweep)
        _tensorized_bwd_dkv_kernel[(sweep.sizes(launched, 1)[0] * k.shape[2] * batch,)](
            *given, dk, du, *sweep.tables(launched, place, q, of_keys=True), *numbers, k.shape[2],
            seqlen, *inputs, *strides(dk, du), **sizes, EVEN_M=sweep.size_q % launched.block_m == 0,
            AFTER=bool(len(sweep.after) and sweep.after.any()), **launched.options(),
        )  # fmt: skip
    return Grads(dq, dk, du, dlogits)
