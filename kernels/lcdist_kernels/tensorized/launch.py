"""Launches of tensorized attention's kernels, like `tiled`, for bf16, fp16 and fp32."""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lcdist_kernels.common import positive_scale
from lcdist_kernels.descriptors import make_descriptors, use_descriptors
from lcdist_kernels.rotary_kernel import Rotation, rotate
from lcdist_kernels.tensorized.bwd_kernel import (
    _tensorized_bwd_dkv_kernel,
    _tensorized_bwd_dq_kernel,
)
from lcdist_kernels.tensorized.grid import ModeGrid
from lcdist_kernels.tensorized.kernel import _row_dot_kernel, _tensorized_fwd_kernel
from lcdist_kernels.tensorized.sweeps import Sweep, SweepTables, WholePlan, sweep_of
from lcdist_kernels.tensorized.tile_configs import (
    BWD_DKV,
    BWD_DKV_HOP_HOPPER,
    BWD_DKV_HOPPER,
    BWD_DQ_TABLES,
    FWD_COMPUTED_TABLES,
    FWD_FORK_TABLES,
    FWD_TABLES,
    QueryTables,
)
from lcdist_kernels.tensorized.tiled import (
    Branch,
    Fibres,
    Grads,
    ModeRotary,
    Partial,
    Saved,
    hop_queries_bwd,
)
from lcdist_kernels.tile_ranges import device_stream
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


class HopRows(NamedTuple):
    """Rows of a hop in its backward pass.

    Attributes:
        du_next, u_next: gradient of the hop's result, and the result, `[b, s, h_u, d]` contiguous.
        lse2: its log-sum-exp in base 2, `[b, h_u, s]`.
        fibre_lse2, fibre_delta: lse2, and the products of these, in the order of fibres; made by
            the launch of dq.
    """

    du_next: Tensor
    u_next: Tensor
    lse2: Tensor
    fibre_lse2: Tensor
    fibre_delta: Tensor


class BranchRows(NamedTuple):
    """Rows of a branch in its backward pass.

    Attributes:
        dout: `[b, s, h, d]`.
        out: like dout, contiguous, where delta is still to be made; else None.
        lse: of the whole row, `[b, h, s]`.
        bias: of the branch, `[h]`, or None for 0.
        delta: dout . out; made by the launch of dq where out is given.
        fibre_lse2, fibre_delta: made by the launch of dq: lse less bias, in base 2, and delta, in
            the order of fibres.
        dlogits: made by the launch of dq, unless None.
    """

    dout: Tensor
    out: Tensor | None
    lse: Tensor
    bias: Tensor | None
    delta: Tensor
    fibre_lse2: Tensor
    fibre_delta: Tensor
    dlogits: Tensor | None


def rotation_by(mode_rotary: ModeRotary, mode: int, x: Tensor) -> Rotation | None:
    """Return the rotation by `mode` on the device of x, or None without rotary."""
    rotary = mode_rotary.rotary
    return None if rotary is None else rotary.rotation(mode_rotary.angle(mode), x)


def rotated(k: Tensor, rotation: Rotation | None) -> Tensor:
    """Return rotated keys, by a kernel of their own: every query tile of a fibre reads them."""
    return k if rotation is None else rotate(k, *rotation)


def mean_of(q: Tensor, k: Tensor, grid: ModeGrid) -> int:
    """Return the query heads whose mean a hop takes as its query."""
    return q.shape[2] // k.shape[2] if grid.hop_heads == "kv" else 1


def whole_fwd(
    qkv: Sequence[Tensor], bias: Tensor, plan: WholePlan, mode_rotary: ModeRotary
) -> Saved:
    """Compute the same as the tiled `whole_fwd`.

    A hop with the branch's queries shares its sweep, from the finest mode to the coarsest. Else all
    hops come first, then the branches: the finest, which takes longest, merges the others beside
    its own work.
    """
    q, k, v = qkv
    if not q.numel():
        raise ValueError(f"q of shape {tuple(q.shape)}: kernels need at least one element")
    grid, scale = mode_rotary.grid, mode_rotary.softmax_scale
    last, mean = len(grid.modes), mean_of(q, k, grid)
    rotations = [rotation_by(mode_rotary, mode, q) for mode in range(last + 1)]
    keys = [rotated(k, rotation) for rotation in rotations]
    values, lambdas, partial = [v], [], None
    if mean > 1:
        for mode, sweeps in enumerate(plan.sweeps[:last]):
            _, u_next, lse2 = _fwd(
                (q, keys[mode], values[mode]), sweeps.hop, scale, mean=mean,
                rotation=rotations[mode],
            )  # fmt: skip
            values.append(u_next)
            lambdas.append(lse2)
    order = range(last + 1) if mean == 1 else reversed(range(last + 1))
    for mode in order:
        sweep = plan.sweeps[mode].both if mean == 1 else plan.sweeps[mode].branch
        own_bias = bias[mode - 1] if mode else None
        partial, u_next, lse2 = _fwd(
            (q, keys[mode], values[mode]), sweep, scale, previous=partial, bias=own_bias,
            rotation=rotations[mode],
        )  # fmt: skip
        if sweep.hop:
            values.append(u_next)
            lambdas.append(lse2)
    assert partial is not None, "there is always a branch"
    return Saved(*partial, values, lambdas)


def whole_bwd(
    dout: Tensor,
    qk: Sequence[Tensor],
    saved: Saved,
    bias: Tensor,
    plan: WholePlan,
    mode_rotary: ModeRotary,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the same as the tiled `whole_bwd`, from the coarsest mode to the finest.

    dq goes from mode to mode in q's dtype, dk in fp32; what a mode adds is added by its kernels.
    """
    (q, k), grid, scale = qk, mode_rotary.grid, mode_rotary.softmax_scale
    last, mean = len(grid.modes), mean_of(q, k, grid)
    dout = last_dim_contiguous(dout.to(q.dtype))
    delta, fibre_lse2, fibre_delta = (_rows_like(q) for _ in range(3))
    dlogits = torch.empty((last, *delta.shape), dtype=torch.float32, device=q.device)
    dq, dk, du = None, None, None
    for mode in reversed(range(last + 1)):
        sweeps = plan.sweeps[mode]
        rotation = rotation_by(mode_rotary, mode, q)
        k_mode, u = rotated(k, rotation), saved.values[mode]
        branch = BranchRows(
            dout, saved.out if mode == last else None, saved.lse, bias[mode - 1] if mode else None,
            delta, fibre_lse2, fibre_delta, dlogits[mode - 1] if mode else None,
        )  # fmt: skip
        hop, hop_q, hop_dq = None, None, None
        if du is not None:
            u_next = saved.values[mode + 1]
            rows = _rows_like(u_next), _rows_like(u_next)
            hop = HopRows(du, u_next, saved.lambdas[mode], *rows)
        if hop is not None and mean > 1:
            hop_dq, hop_q = _bwd_dq(
                (q, k_mode, u), sweeps.hop, scale, hop=hop, mean=mean, rotation=rotation
            )
        dq, used_q = _bwd_dq(
            (q, k_mode, u), sweeps.both if mean == 1 else sweeps.branch, scale, branch=branch,
            hop=hop if mean == 1 else None, hop_dq=hop_dq, previous=dq, dtype=q.dtype,
            rotation=rotation,
        )  # fmt: skip
        dk, du = _bwd_dkv(
            (used_q, k_mode, u), sweeps.both, scale, branch=branch, hop=hop,
            hop_q=used_q if hop_q is None else hop_q, previous=dk,
            dtypes=(torch.float32 if mode else k.dtype, q.dtype), rotation=rotation,
        )  # fmt: skip
    assert dq is not None and dk is not None and du is not None, "there is always a branch"
    return dq, dk, du, dlogits.sum((1, 3))


def branch_fwd(qku: Sequence[Tensor], branch: Branch, softmax_scale: float) -> Partial:
    """Compute the same as the tiled `branch_fwd`."""
    q, k, _ = qku
    if not q.numel():
        out = q.new_zeros(q.shape, dtype=torch.float32)
        return Partial(out, out.new_empty(q.shape[0], q.shape[2], q.shape[1]))
    sweep = sweep_of(q.shape[1], k.shape[1], branch, None, own_keys=False)
    partial = _fwd(qku, sweep, softmax_scale, dtype=torch.float32)[0]
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
    q, k, u = qku
    lse, delta = (x.float().contiguous() for x in row_stats)
    dlogits = _rows_like(q)
    if not q.numel():
        grads = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in qku)
        return Grads(*grads, dlogits)
    sweep = sweep_of(q.shape[1], k.shape[1], branch, None, own_keys=False)
    dout = last_dim_contiguous(dout.to(q.dtype))
    of_fibres = _rows_like(q), _rows_like(q)
    rows = BranchRows(dout, None, lse, None, delta, *of_fibres, dlogits)
    dq, _ = _bwd_dq(qku, sweep, softmax_scale, branch=rows)
    return Grads(dq, *_bwd_dkv(qku, sweep, softmax_scale, branch=rows), dlogits)


def hop_fwd(
    q: Tensor, k: Tensor, u: Tensor, mode: int, mode_rotary: ModeRotary
) -> tuple[Tensor, Tensor]:
    """Compute the same as the tiled `hop_fwd`; lambda_j is `[b, h, s]`, in base 2."""
    grid = mode_rotary.grid
    sweep = sweep_of(q.shape[1], k.shape[1], None, Fibres(grid.modes[mode], grid.strides[mode]))
    _, u_next, hop_lse = _fwd((q, k, u), sweep, mode_rotary.softmax_scale, mean=mean_of(q, k, grid))
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
    (q, k, _), grid, scale = qku, mode_rotary.grid, mode_rotary.softmax_scale
    mean = mean_of(q, k, grid)
    sweep = sweep_of(q.shape[1], k.shape[1], None, Fibres(grid.modes[mode], grid.strides[mode]))
    u_next, lse2 = hop_saved
    of_fibres = _rows_like(u_next), _rows_like(u_next)
    hop = HopRows(du_next.to(q.dtype).contiguous(), u_next, lse2, *of_fibres)
    dq, hop_q = _bwd_dq(qku, sweep, scale, hop=hop, mean=mean)
    dk, du = _bwd_dkv(qku, sweep, scale, hop=hop, hop_q=hop_q)
    return hop_queries_bwd(dq, q.shape[2]), dk, du


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
    table: LaunchTable, q: Tensor, sweep: Sweep, hopper: LaunchTable, of_keys: bool = False,
    heads: int = 1,
) -> tuple[Launch, int]:  # fmt: skip
    """Return the tiles of `table` and `hopper` for fibres, and how many query heads fill a tile.

    Rows of products are queries, or keys where the kernel owns keys (of_keys). A tile is cut to the
    fibre's size, a product has 16 rows or more, and an entry of `hopper` keeps 16 rows a warp when
    cut.

    Args:
        heads: most query heads that a tile of queries may have, that share keys and U. Where heads
            take the place of what is cut, block_m has the rows of all of them.
    """
    launch = choose_launch(table, q, hopper)
    return _cut_to_fibres(launch, sweep, launch in hopper.values(), heads, of_keys)


def _cut_to_fibres(
    launch: Launch, sweep: Sweep, few_warps: bool, heads: int = 1, of_keys: bool = False
) -> tuple[Launch, int]:
    """Return `_fit_launch` of an entry; few_warps: keep 16 rows a warp."""
    fibre = min(launch.block_m, max(16, triton.next_power_of_2(sweep.size_q)))
    block_n = min(launch.block_n, max(16, triton.next_power_of_2(sweep.size_k)))
    together = 1
    while heads % (2 * together) == 0 and 2 * together * fibre <= launch.block_m:
        together *= 2
    block_m = fibre * together
    rows = block_n if of_keys else block_m
    small = block_m * block_n < 64 * 32 or (few_warps and rows <= 64)
    launch = launch._replace(
        block_m=block_m, block_n=block_n, num_warps=4 if small else launch.num_warps
    )
    return launch, together


def _heads_together(q: Tensor, k: Tensor, u: Tensor, sweep: Sweep, mean: int) -> int:
    """Return the query heads that share keys and U, for a branch alone; else 1."""
    alone = sweep.band is not None and not sweep.hop and mean == 1
    return q.shape[2] // k.shape[2] if alone and u.shape[2] == k.shape[2] else 1


def _for_queries(
    tables: QueryTables, qku: Sequence[Tensor], sweep: Sweep, mean: int
) -> tuple[Launch, int, list[Any], bool]:
    """Return how a kernel that owns queries is launched.

    A sweep of branch and hop has no registers left for the overlap that descriptors are for, and a
    fibre of less than a tile has no loop to overlap.

    Returns:
        The tiles, the query heads that fill one, k and u as the kernel takes them, and whether
        these are descriptors.
    """
    (q, k, u), (table, hopper, wide) = qku, tables
    alone = sweep.band is None or not sweep.hop
    launch, described = choose_launch(table, q, hopper), False
    if alone and k.shape[2] == u.shape[2] and sweep.size_k >= launch.block_n:
        by_boxes = choose_launch(table, q, hopper | wide) if wide else launch
        described = sweep.size_k >= by_boxes.block_n and use_descriptors(k, u, step=sweep.stride)
        launch = by_boxes if described else launch
    most = _heads_together(q, k, u, sweep, mean)
    launch, heads = _cut_to_fibres(launch, sweep, described or launch in hopper.values(), most)
    keys = make_descriptors(launch.block_n, k, u, step=sweep.stride) if described else [k, u]
    return launch, heads, keys, described


def _rows_of(
    sweep: Sweep, block_m: int, branch: BranchRows | None, hop: HopRows | None,
    queries: tuple[Tensor, Tensor | None],
) -> tuple[list[Any], bool]:  # fmt: skip
    """Return rows of queries as the kernel that owns keys takes them, and whether by descriptors.

    Of branch and hop together the loops would spill more by descriptors.

    queries: of the branch, and of the hop. The rows are q, dout, the hop's q and the gradient of
    its result; None for what there is not.
    """
    q, hop_q = queries
    rows = [q if branch else None, branch and branch.dout, hop and hop_q, hop and hop.du_next]
    given = [x for x in rows if x is not None]
    alone = branch is None or hop is None
    if not alone or sweep.size_q < block_m or not use_descriptors(*given, step=sweep.stride):
        return rows, False
    made = make_descriptors(block_m, *given, step=sweep.stride)
    return [*made, None, None] if branch else [None, None, *made], True


def _sizes(q: Tensor, k: Tensor, u: Tensor, mean: int, tables: SweepTables) -> dict[str, Any]:
    """Return the constants of heads and limits; queries are means over `mean` heads."""
    nheads, head_dim = q.shape[2] // mean, q.shape[3]
    return {
        "GROUP_K": nheads // k.shape[2],
        "GROUP_U": nheads // u.shape[2],
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded(head_dim),
        "HAS_LO": tables.has_lo,
    }


def _fwd(
    qku: Sequence[Tensor],
    sweep: Sweep | None,
    softmax_scale: float,
    *,
    previous: Partial | None = None,
    bias: Tensor | None = None,
    mean: int = 1,
    dtype: torch.dtype | None = None,
    rotation: Rotation | None = None,
) -> tuple[Partial | None, Tensor | None, Tensor | None]:
    """Return (the branch's partial, U, lambda in base 2); None for parts the sweep lacks.

    Args:
        previous: the partial of other branches, to merge with.
        bias: of the branch `[h]`; None: 0.
        mean: query heads whose mean is a query, for a hop alone.
        dtype: of the partial; default: q's.
        rotation: of q; k is rotated already.
    """
    assert sweep is not None, "the coarsest mode has no hop"
    q, k, u = map(last_dim_contiguous, qku)
    check_kernel(q)
    q, softmax_scale = positive_scale(q, softmax_scale)
    batch, seqlen, nheads, head_dim = q.shape
    nheads //= mean
    shape, rows = (batch, seqlen, nheads, head_dim), (batch, nheads, seqlen)
    partial, u_next, hop_lse = None, None, None
    if sweep.band is not None:
        out = torch.empty(shape, dtype=dtype or q.dtype, device=q.device)
        partial = Partial(out, torch.empty(rows, dtype=torch.float32, device=q.device))
    if sweep.hop:
        u_next = torch.empty(shape, dtype=u.dtype, device=q.device)
        hop_lse = torch.empty(rows, dtype=torch.float32, device=q.device)
    by_tables = FWD_COMPUTED_TABLES if mean > 1 or rotation else FWD_TABLES
    if sweep.hop and sweep.band is not None:
        by_tables = FWD_FORK_TABLES
    launch, heads, keys, described = _for_queries(by_tables, (q, k, u), sweep, mean)
    of_fibre = launch._replace(block_m=launch.block_m // heads)
    tables = sweep.tables(of_fibre, device_stream(q), of_keys=False)
    of_rotation = (*rotation, rotation.stride) if rotation else (None, None, 1.0, 0)
    with launch_context(q):
        _tensorized_fwd_kernel[(sweep.programs(of_fibre) * nheads // heads * batch,)](
            q, *keys, *(previous or (None, None)), *(partial or (None, None)), u_next, hop_lse,
            None if bias is None else bias.contiguous(), *of_rotation[:2], *tables[:5],
            *of_rotation[2:], softmax_scale * LOG2E.value,
            sweep.size_q, sweep.size_k, sweep.stride, sweep.outers, nheads, seqlen,
            *strides(q, k, u), **_sizes(q, k, u, mean, tables), MEAN=mean, HEADS=heads,
            **sweep.flags, DESCRIBED=described,
            EVEN_N=sweep.size_k % launch.block_n == 0, **launch.options(),
        )  # fmt: skip
    return partial, u_next, hop_lse


def _rows_like(q: Tensor) -> Tensor:
    """Return an empty fp32 `[b, h, s]` for q `[b, s, h, d]`."""
    batch, seqlen, nheads, _ = q.shape
    return torch.empty((batch, nheads, seqlen), dtype=torch.float32, device=q.device)


def _bwd_dq(
    qku: Sequence[Tensor],
    sweep: Sweep | None,
    softmax_scale: float,
    *,
    branch: BranchRows | None = None,
    hop: HopRows | None = None,
    previous: Tensor | None = None,
    hop_dq: Tensor | None = None,
    mean: int = 1,
    dtype: torch.dtype = torch.float32,
    rotation: Rotation | None = None,
) -> tuple[Tensor, Tensor]:
    """Return dq of a sweep, and the queries it took; fill what `branch` and `hop` leave to it.

    Args:
        previous: dq of other modes, like q and contiguous, to be added.
        hop_dq: dq of the hop's mean queries, fp32 and contiguous, of which each query of the group
            gets its share.
        mean: query heads whose mean is a query, for a hop alone: dq is then that of the means.
        rotation: of q, and of dq back, but not of the dq of means; k is rotated already.
    """
    assert sweep is not None, "the coarsest mode has no hop"
    q, k, u = map(last_dim_contiguous, qku)
    check_kernel(q)
    batch, seqlen, nheads, head_dim = q.shape
    nheads //= mean
    shape = (batch, seqlen, nheads, head_dim)
    dq = torch.empty(shape, dtype=dtype, device=q.device)
    kept = mean == 1 and rotation is None
    used = None if kept else torch.empty(shape, dtype=q.dtype, device=q.device)
    dout, out, lse, bias, *of_branch = branch or [None] * 8
    launch, heads, keys, described = _for_queries(BWD_DQ_TABLES, (q, k, u), sweep, mean)
    of_fibre = launch._replace(block_m=launch.block_m // heads)
    tables = sweep.tables(of_fibre, device_stream(q), of_keys=False)
    of_rotation = (*rotation, rotation.stride) if rotation else (None, None, 1.0, 0)
    with launch_context(q):
        _tensorized_bwd_dq_kernel[(sweep.programs(of_fibre) * nheads // heads * batch,)](
            q, *keys, dout, out, lse, None if bias is None else bias.contiguous(), *of_branch,
            *(hop or [None] * 5), previous, hop_dq, used, dq, *of_rotation[:2],
            *tables[:5], *of_rotation[2:], float(softmax_scale), sweep.size_q, sweep.size_k,
            sweep.stride, sweep.outers, nheads, seqlen,
            *strides(q, k, u, q if dout is None else dout), **_sizes(q, k, u, mean, tables),
            MEAN=mean, HEADS=heads, **sweep.flags, DESCRIBED=described,
            EVEN_N=sweep.size_k % launch.block_n == 0, **launch.options(),
        )  # fmt: skip
    return dq, q if used is None else used


def _bwd_dkv(
    qku: Sequence[Tensor],
    sweep: Sweep,
    softmax_scale: float,
    *,
    branch: BranchRows | None = None,
    hop: HopRows | None = None,
    hop_q: Tensor | None = None,
    previous: Tensor | None = None,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    rotation: Rotation | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (dk, dU) of a sweep in `dtypes`, after `_bwd_dq`.

    Args:
        hop_q: the queries of the hop: one or all heads of a group.
        previous: dk of other modes, fp32 and contiguous, to be added.
        rotation: that dk is turned back from; queries and keys are rotated already.
    """
    q, k, u = map(last_dim_contiguous, qku)
    batch, seqlen, nheads, _ = q.shape
    nheads_k = k.shape[2]
    dk, du = (
        torch.empty(x.shape, dtype=dtype, device=x.device)
        for x, dtype in zip((k, u), dtypes, strict=True)
    )
    of_branch = (None, None) if branch is None else (branch.fibre_lse2, branch.fibre_delta)
    of_hop = (None, None) if hop is None else (hop.fibre_lse2, hop.fibre_delta)
    hopper = BWD_DKV_HOP_HOPPER if branch is None else BWD_DKV_HOPPER
    launch, _ = _fit_launch(BWD_DKV, q, sweep, hopper, of_keys=True)
    tables = sweep.tables(launch, device_stream(q), of_keys=True)
    group_hop = 1 if hop is None or hop_q is None else hop_q.shape[2] // nheads_k
    # A hop alone with mean queries has a group of one.
    mean = 1 if branch is not None else nheads // (nheads_k * group_hop)
    of_rotation = (*rotation, rotation.stride) if rotation else (None, None, 1.0, 0)
    rows, described = _rows_of(sweep, launch.block_m, branch, hop, (q, hop_q))
    with launch_context(q):
        _tensorized_bwd_dkv_kernel[(sweep.programs(launch, of_keys=True) * nheads_k * batch,)](
            rows[0], k, u, rows[1], *of_branch, *rows[2:], *of_hop, previous, dk, du,
            *of_rotation[:2], *tables[:5], *of_rotation[2:], float(softmax_scale),
            sweep.size_q, sweep.size_k, sweep.stride, sweep.outers, nheads_k, seqlen,
            sweep.seqlen_k, *strides(q, k, u, q if branch is None else branch.dout,
            q if hop_q is None else hop_q), **_sizes(q, k, u, mean, tables), GROUP_HOP=group_hop,
            EVEN_M=sweep.size_q % launch.block_m == 0, **sweep.flags, DESCRIBED=described,
            **launch.options(),
        )  # fmt: skip
    return dk, du
