"""Launches of tensorized attention's kernels, like `tiled`, for bf16, fp16 and fp32."""
# Python's type checkers do not know `tl.constexpr` arguments.
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
from lcdist_kernels.tensorized.tile_configs import (
    BWD_DKV,
    BWD_DKV_HOP_HOPPER,
    BWD_DKV_HOPPER,
    BWD_DQ,
    BWD_DQ_HOPPER,
    FWD,
    FWD_FORK_HOPPER,
    FWD_HOPPER,
)
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
    """Fibres, the branch over them (None: no branch), and whether a hop runs along.

    before, after: whole blocks that a block's branch sees before its own, and blocks after its own
    that see it; empty where branches stay inside fibres.
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
        """Return the constants that kernels are compiled with."""
        return {"BRANCH": self.band is not None, "HOP": self.hop}

    def parts(self) -> "Sequence[Sweep]":
        """Return the sweeps of the branch and of the hop.

        dk and dU of both at once need registers for six products and two sets of row statistics:
        compiled for sm_90, more than twice the instructions of two launches, and spills.
        """
        branch, hop = self._replace(hop=False), self._replace(band=None, after=NO_BLOCKS)
        return ([branch] if self.band is not None else []) + ([hop] if self.hop else [])

    def sizes(self, launch: Launch, side: int) -> tuple[int, int]:
        """Return (tiles of all fibres of a sequence, tiles of one) of queries (0) or keys (1)."""
        tiles = triton.cdiv(self[side], launch[side])
        return tiles * self.stride * self.outers, tiles

    def tables(self, launch: Launch, place: DeviceStream, x: Tensor, of_keys: bool) -> list[Tensor]:
        """Return q_idx, q_lo, k_idx, ranges and before or after; x in place of unused tables."""
        block_m, block_n = launch.block_m, launch.block_n
        if self.band is None:
            return [x, x, on_device(Indices(torch.arange(self.size_k)), place), x, x]
        band = band_of(*self.band)
        ranges = (query_ranges if of_keys else key_ranges)(band, block_m, block_n, place)
        blocks = self.after if of_keys else self.before
        k_idx = band.k_idx
        if len(blocks):
            # Rows of earlier blocks are counted from 0 too.
            k_idx = Indices(torch.arange(self.size_k * max(1, int(blocks.max()))))
        return [
            on_device(band.q_idx, place),
            on_device(band.q_lo, place),
            on_device(k_idx, place),
            ranges,
            on_device(Indices(blocks), place) if len(blocks) else x,
        ]


NO_BLOCKS = torch.empty(0, dtype=torch.int64)


def sweep_of(q: Tensor, k: Tensor, branch: Branch | None, hop: Fibres | None) -> Sweep:
    """Return the sweep of a branch and a hop of the same mode.

    A branch over a run of tokens is cut into the hop's fibres; blocks that it sees before them are
    counted in units of a fibre.
    """
    seqlen = q.shape[1]
    if branch is None:
        assert hop is not None, "a sweep has a branch or a hop"
        outers = seqlen // (hop.size * hop.stride)
        return Sweep(hop.size, hop.size, hop.stride, outers, None, True, NO_BLOCKS, NO_BLOCKS)
    if branch.fibres is not None:
        size, stride = branch.fibres.size, branch.fibres.stride
        outers = seqlen // (size * stride)
        return Sweep(size, size, stride, outers, branch.band, hop is not None, NO_BLOCKS, NO_BLOCKS)
    if hop is None:
        return Sweep(seqlen, k.shape[1], 1, 1, branch.band, False, NO_BLOCKS, NO_BLOCKS)
    size, outers = hop.size, seqlen // hop.size
    first, lo = (x[::size].contiguous() for x in branch.band[:2])
    after = torch.searchsorted(lo, first, right=True) - 1 - torch.arange(outers)
    before = (first - lo) // size
    return Sweep(size, size, 1, outers, past_band(size, 0), True, before, after)


def same_queries(hop: bool, q: Tensor, k: Tensor, mode_rotary: ModeRotary) -> bool:
    """Return whether hop and branch have the same queries."""
    return hop and (mode_rotary.grid.hop_heads == "q" or q.shape[2] == k.shape[2])


def mode_fwd(
    qku: Sequence[Tensor],
    branch: Branch,
    mode: int,
    mode_rotary: ModeRotary,
    previous: Partial | None,
    bias: Tensor,
) -> tuple[Partial, Tensor | None, Tensor | None]:
    """Compute the same as the tiled `mode_fwd`, in one sweep where `same_queries`."""
    grid, last = mode_rotary.grid, mode == len(mode_rotary.grid.modes)
    q, k, u = qku
    if not q.numel():
        raise ValueError(f"q of shape {tuple(q.shape)}: kernels need at least one element")
    together = same_queries(not last, q, k, mode_rotary)
    fibres = None if last else Fibres(grid.modes[mode], grid.strides[mode])
    sweep = sweep_of(q, k, branch, fibres if together else None)
    merged = None if previous is None else (previous, bias[mode - 1])
    partial, u_next, hop_lse = _fwd(
        qku, sweep, mode_rotary.softmax_scale, merged, q.dtype if last else torch.float32
    )
    assert partial is not None, "a sweep with a branch has a partial"
    if not last and not together:
        u_next, hop_lse = hop_fwd(q, k, u, mode, mode_rotary)
    return partial, u_next, hop_lse


def mode_bwd(
    dout: Tensor, qku: Sequence[Tensor], row_stats: tuple[Tensor, Tensor], branch: Branch,
    hop_saved: Sequence[Tensor] | None, mode: int, mode_rotary: ModeRotary,
) -> Grads:  # fmt: skip
    """Compute the same as the tiled `mode_bwd`."""
    q, k, _ = qku
    grid, scale = mode_rotary.grid, mode_rotary.softmax_scale
    if hop_saved is None or not same_queries(True, q, k, mode_rotary):
        grads = branch_bwd(dout, qku, row_stats, branch, scale)
        if hop_saved is not None:
            more = hop_bwd(hop_saved[0], qku, hop_saved[1:], mode, mode_rotary)
            for total, one in zip(grads[:3], more, strict=True):
                total += one
        return grads
    fibres = Fibres(grid.modes[mode], grid.strides[mode])
    return _bwd(qku, sweep_of(q, k, branch, fibres), scale, (dout, *row_stats), hop_saved)


def branch_fwd(qku: Sequence[Tensor], branch: Branch, softmax_scale: float) -> Partial:
    """Compute the same as the tiled `branch_fwd`."""
    q, k, _ = qku
    if not q.numel():
        out = q.new_zeros(q.shape, dtype=torch.float32)
        return Partial(out, out.new_empty(q.shape[0], q.shape[2], q.shape[1]))
    sweep = sweep_of(q, k, branch, None)
    partial = _fwd(qku, sweep, softmax_scale, None, torch.float32)[0]
    assert partial is not None, "a sweep with a branch has a partial"
    return partial


def branch_bwd(
    dout: Tensor,
    qku: Sequence[Tensor],
    row_stats: tuple[Tensor, Tensor],
    branch: Branch,
    softmax_scale: float,
) -> Grads:
    """Compute the same as the tiled `branch_bwd`."""
    q, k, _ = qku
    return _bwd(qku, sweep_of(q, k, branch, None), softmax_scale, (dout, *row_stats), None)


def hop_fwd(
    q: Tensor, k: Tensor, u: Tensor, mode: int, mode_rotary: ModeRotary
) -> tuple[Tensor, Tensor]:
    """Compute the same as the tiled `hop_fwd`; lambda_j is `[b, h, s]`, a mean query in q.dtype."""
    grid = mode_rotary.grid
    q = hop_queries(q, k.shape[2], grid).to(k.dtype)
    sweep = sweep_of(q, k, None, Fibres(grid.modes[mode], grid.strides[mode]))
    _, u_next, hop_lse = _fwd((q, k, u), sweep, mode_rotary.softmax_scale, None, torch.float32)
    assert u_next is not None and hop_lse is not None, "a sweep with a hop has a U"
    return u_next, hop_lse


def hop_bwd(
    du_next: Tensor,
    qku: Sequence[Tensor],
    hop_saved: Sequence[Tensor],
    mode: int,
    mode_rotary: ModeRotary,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same as the tiled `hop_bwd`; lambda_j as `hop_fwd` returned it."""
    (q, k, u), grid, nheads = qku, mode_rotary.grid, qku[0].shape[2]
    q = hop_queries(q, k.shape[2], grid).to(k.dtype)
    sweep = sweep_of(q, k, None, Fibres(grid.modes[mode], grid.strides[mode]))
    grads = _bwd((q, k, u), sweep, mode_rotary.softmax_scale, None, (du_next, *hop_saved))
    return hop_queries_bwd(grads.dq, nheads), grads.dk, grads.du


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """Return dout . out of every row: `[b, s, h, d]` -> `[b, h, s]` in fp32."""
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


def _fit_launch(
    table: LaunchTable, q: Tensor, sweep: Sweep, hopper: LaunchTable, of_keys: bool = False
) -> Launch:
    """Return the tiles of `table` and `hopper`, cut to the fibres; a product has 16 rows or more.

    Rows of products are queries, or keys where the kernel owns keys (of_keys). An entry of `hopper`
    keeps 16 rows a warp when cut.
    """
    launch = choose_launch(table, q, hopper)
    most = [max(16, triton.next_power_of_2(size)) for size in sweep[:2]]
    block_m, block_n = min(launch.block_m, most[0]), min(launch.block_n, most[1])
    rows = block_n if of_keys else block_m
    small = block_m * block_n < 64 * 32 or (launch in hopper.values() and rows <= 64)
    return launch._replace(
        block_m=block_m, block_n=block_n, num_warps=4 if small else launch.num_warps
    )


def _sizes(q: Tensor, k: Tensor, u: Tensor, sweep: Sweep) -> dict[str, Any]:
    """Return the constants of heads and limits."""
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
    """Return (the branch's partial, merged if asked, U, lambda); None for parts the sweep lacks.

    merged: the partial of finer branches, overwritten if fp32, and the bias `[h]`.
    """
    q, k, u = (last_dim_contiguous(x) for x in qku)
    check_kernel(q)
    if softmax_scale < 0:
        q, softmax_scale = -q, -softmax_scale
    batch, seqlen, nheads, _ = q.shape
    partial, u_next, hop_lse = None, None, None
    if sweep.band is not None:
        if merged is not None and out_dtype == merged[0].out.dtype:
            partial = merged[0]
        else:
            out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
            partial = Partial(out, _rows_like(q))
    if sweep.hop:
        u_next, hop_lse = torch.empty(q.shape, dtype=u.dtype, device=q.device), _rows_like(q)
    hopper = FWD_FORK_HOPPER if sweep.hop and sweep.band is not None else FWD_HOPPER
    launch, place = _fit_launch(FWD, q, sweep, hopper), device_stream(q)
    before, bias = merged or (None, None)
    outs = [*(partial or (q, q)), *((q, q) if u_next is None else (u_next, hop_lse))]
    with launch_context(q):
        _tensorized_fwd_kernel[(sweep.sizes(launch, 0)[0] * nheads * batch,)](
            q, k, u, *(before or (q, q)), *outs, q if bias is None else bias.contiguous(),
            *sweep.tables(launch, place, q, of_keys=False), softmax_scale * LOG2E.value,
            sweep.size_q, sweep.size_k, sweep.stride, sweep.outers, nheads, seqlen,
            *strides(q, k, u, before.out if before else q, outs[0], outs[2]),
            **_sizes(q, k, u, sweep), MERGE=merged is not None,
            BEFORE=bool(len(sweep.before) and sweep.before.any()), **launch.options(),
        )  # fmt: skip
    return partial, u_next, hop_lse


def _rows_like(q: Tensor) -> Tensor:
    """Return an empty fp32 `[b, h, s]` for q `[b, s, h, d]`."""
    batch, seqlen, nheads, _ = q.shape
    return torch.empty((batch, nheads, seqlen), dtype=torch.float32, device=q.device)


def _bwd(
    qku: Sequence[Tensor],
    sweep: Sweep,
    softmax_scale: float,
    branch: tuple[Tensor, Tensor, Tensor] | None,
    hop: Sequence[Tensor] | None,
) -> Grads:
    """Return the gradients of a sweep in fp32.

    branch: dout, lse less bias, delta. hop: dU, U, lambda.
    """
    q, k, u = (last_dim_contiguous(x) for x in qku)
    check_kernel(q)
    batch, seqlen, nheads, _ = q.shape
    dq, dk, du = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, u))
    dlogits = _rows_like(q)
    if not q.numel():
        return Grads(dq, dk, du, dlogits)
    dout, lse, delta, du_next, hop_lse, hop_delta = [q] * 6
    if branch is not None:
        dout = last_dim_contiguous(branch[0].to(q.dtype))
        lse, delta = (x.float().contiguous() for x in branch[1:])
    if hop is not None:
        du_next, hop_lse = last_dim_contiguous(hop[0].to(q.dtype)), hop[2].contiguous()
        hop_delta = row_delta(du_next, hop[1])
    place = device_stream(q)
    numbers = [
        float(softmax_scale),
        sweep.size_q,
        sweep.size_k,
        sweep.stride,
        sweep.outers,
    ]
    inputs = strides(q, k, u, dout, du_next)
    pointers = [q, k, u, dout, du_next, lse, delta, hop_lse, hop_delta]
    with launch_context(q):
        launch = _fit_launch(BWD_DQ, q, sweep, BWD_DQ_HOPPER)
        _tensorized_bwd_dq_kernel[(sweep.sizes(launch, 0)[0] * nheads * batch,)](
            *pointers, dq, dlogits, *sweep.tables(launch, place, q, of_keys=False), *numbers,
            nheads, seqlen, *inputs, *strides(dq), **_sizes(q, k, u, sweep),
            BEFORE=bool(len(sweep.before) and sweep.before.any()), **launch.options(),
        )  # fmt: skip
        for number, part in enumerate(sweep.parts()):
            hopper = BWD_DKV_HOPPER if part.band is not None else BWD_DKV_HOP_HOPPER
            launch = _fit_launch(BWD_DKV, q, part, hopper, of_keys=True)
            outs = (torch.empty_like(dk), torch.empty_like(du)) if number else (dk, du)
            _tensorized_bwd_dkv_kernel[(part.sizes(launch, 1)[0] * k.shape[2] * batch,)](
                *pointers, *outs, *part.tables(launch, place, q, of_keys=True), *numbers,
                k.shape[2], seqlen, *inputs, *strides(dk, du), **_sizes(q, k, u, part),
                EVEN_M=part.size_q % launch.block_m == 0,
                AFTER=bool(len(part.after) and part.after.any()), **launch.options(),
            )  # fmt: skip
            if number:
                dk += outs[0]
                du += outs[1]
    return Grads(dq, dk, du, dlogits)
