"""Tensorized attention mode by mode in torch: memory linear in the sequence, gradients by hand.

A fibre of mode j is strided rows of a contiguous tensor, so a reshape makes fibres the rows of a
batch and the s_j offsets heads beside the others; every branch and hop is then softmax attention
with a band of its own. With lse and delta = dout . out of the whole row, out over all branches
(FlashAttention-2, arXiv:2307.08691), branch j and the hop of mode j have, G being dU_j,

    p = exp(s + bias_j - lse)           f = exp(s - lambda_j)
    ds = p (dout . u - delta) + f (G . u - G . U_j)          dbias_j = sum of the first
    dU_{j-1} = p^T dout + f^T G         dq = softmax_scale ds k,   dk = softmax_scale ds^T q

from the coarsest mode to the finest: no weight is kept, only U_j, lambda_j, out and lse.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lcdist_kernels.common import wide_dtype
from lcdist_kernels.full import full_fwd
from lcdist_kernels.partial import merge
from lcdist_kernels.rotary import Rotary
from lcdist_kernels.tensorized.grid import ModeGrid
from lcdist_kernels.tiles import Tile, fold, tile_sides, tiles_of_band, unfold, view_of


class Band(NamedTuple):
    """Keys with q_lo <= k_idx <= q_idx are seen; int64 on the CPU."""

    q_idx: Tensor
    q_lo: Tensor
    k_idx: Tensor


class Partial(NamedTuple):
    """out `[b, s, h, d]` and lse `[b, h, s]` over some of the keys, in fp32 or float64."""

    out: Tensor
    lse: Tensor


class Grads(NamedTuple):
    """Of one branch or hop: like q, k and u; and of every row's logits `[b, h, s]`, summed."""

    dq: Tensor
    dk: Tensor
    du: Tensor
    dlogits: Tensor


@dataclass(frozen=True)
class ModeRotary:
    """How queries and keys at hand become those of a mode, and what scores are multiplied by."""

    grid: ModeGrid
    rotary: Rotary | None
    positions: Tensor
    softmax_scale: float

    def rotate(self, x: Tensor, mode: int) -> Tensor:
        """`x` `[b, s, h, d]` rotated as `mode` has it."""
        if self.rotary is None:
            return x
        return self.rotary.rotate(x, self.grid.angle(self.positions, mode))

    def rotate_back(self, dx: Tensor, mode: int) -> Tensor:
        """The adjoint of `turn`: the opposite angle."""
        if self.rotary is None:
            return dx
        return self.rotary.rotate(dx, -self.grid.angle(self.positions, mode))


@dataclass(frozen=True)
class Fibres:
    """The fibres of `size` tokens `stride` apart that the tokens at hand consist of."""

    size: int
    stride: int

    def of(self, x: Tensor) -> Tensor:
        """[b, s, h, d] -> [b * outer, size, stride * h, d]: a view where x is contiguous."""
        return x.reshape(-1, self.size, self.stride * x.shape[2], x.shape[3])

    def rows(self, x: Tensor) -> Tensor:
        """[b, h, s] -> [b * outer, stride * h, size], as `of` has tokens."""
        parts = x.unflatten(2, (-1, self.size, self.stride)).permute(0, 2, 4, 1, 3)
        return parts.reshape(-1, self.stride * x.shape[1], self.size)

    def joined(self, x: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """The inverse of `of`; shape: [b, s, h, d]."""
        return x.reshape(shape)

    def joined_rows(self, x: Tensor, batch: int) -> Tensor:
        """The inverse of `rows`."""
        parts = x.unflatten(0, (batch, -1)).unflatten(2, (self.stride, -1))
        return parts.permute(0, 3, 1, 4, 2).flatten(2)


def hop_queries(q: Tensor, nheads_kv: int, grid: ModeGrid) -> Tensor:
    """The queries of hidden hops: q, or the mean over each group in the wider of fp32 and q's."""
    if grid.hop_heads == "q":
        return q
    return q.to(wide_dtype(q.dtype)).unflatten(2, (nheads_kv, -1)).mean(3)


def hop_queries_bwd(dq: Tensor, nheads: int) -> Tensor:
    """Their adjoint: `[b, s, nheads, d]`."""
    group = nheads // dq.shape[2]
    return dq if group == 1 else (dq / group).repeat_interleave(group, 2)


def softmax_fwd(qku: Sequence[Tensor], band: Band, softmax_scale: float) -> Partial:
    """`full_fwd` of q, k and u, where u may have a multiple of k's heads; no heads are legal."""
    q, k, u = qku
    if not q.numel():
        out = q.new_empty(q.shape, dtype=wide_dtype(q.dtype))
        return Partial(out, out.new_empty(q.shape[0], q.shape[2], q.shape[1]))
    # The mean query is wider than a bf16 key: `full_fwd` folds each on its own.
    k = k.repeat_interleave(u.shape[2] // k.shape[2], 2)
    return Partial(*full_fwd(q, k, u, band.q_idx, band.q_lo, band.k_idx, softmax_scale))


def softmax_bwd(
    dout: Tensor,
    qku: Sequence[Tensor],
    lse: Tensor,
    delta: Tensor,
    band: Band,
    softmax_scale: float,
) -> Grads:
    """The share of the gradients that passes through these keys, in the wider of fp32 and theirs.

    qku: rotated q `[b, s_q, h, d]`, k `[b, s_k, h_k, d]`, u `[b, s_k, h_u, d]`, h_u a multiple of
    h_k; lse, delta `[b, h, s_q]`: of the whole row, also over keys that are not here.
    """
    q, k, u = qku
    if not q.numel():
        wide = wide_dtype(q.dtype)
        zeros = [torch.zeros_like(x, dtype=wide) for x in qku]
        return Grads(zeros[0], zeros[1], zeros[2], torch.zeros_like(delta))
    shapes, repeats = (q.shape, k.shape, u.shape), u.shape[2] // k.shape[2]
    k = k.repeat_interleave(repeats, 2)
    dout, q, k, u = (fold(x, shapes[2][2]) for x in (dout, q, k, u))
    k, u = k.squeeze(1), u.squeeze(1)
    lse, delta = (x.reshape(q.shape[:3]) for x in (lse, delta))
    dq, dk, du = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(u)
    dlogits = torch.zeros_like(delta)
    block_q, block_k, units = tile_sides(q, k)
    scratch = q.new_empty(2, units * q.shape[1] * block_q * block_k)
    for start, stop, tiles in tiles_of_band(*band, block_q, block_k, q.device):
        for unit in range(0, len(q) if tiles else 0, units):
            rows = (slice(unit, unit + units), slice(None), slice(start, stop))
            own = rows[0]
            _bwd_rows(
                (dout[rows], q[rows] * softmax_scale, lse[rows], delta[rows]),
                (k[own], u[own]),
                (dq[rows], dk[own], du[own], dlogits[rows]),
                tiles,
                scratch,
            )
    dq.mul_(softmax_scale)
    dk_shape = (*shapes[1][:2], shapes[2][2], shapes[1][3])
    dk = unfold(dk[:, None], dk_shape).unflatten(2, (-1, repeats)).sum(3)
    dlogits = dlogits.reshape(shapes[0][0], shapes[0][2], shapes[0][1])
    return Grads(unfold(dq, shapes[0]), dk, unfold(du[:, None], shapes[2]), dlogits)


def _bwd_rows(
    queries: tuple[Tensor, Tensor, Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
    tiles: list[Tile],
    scratch: Tensor,
) -> None:
    units, group, rows, head_dim = queries[0].shape
    dout, q = (x.reshape(units, group * rows, head_dim) for x in queries[:2])
    lse, delta = (x.reshape(units, group * rows, 1) for x in queries[2:])
    (k, u), (dq, dk, du, dlogits) = keys, grads
    dq_rows, dlogits_rows = torch.zeros_like(q), torch.zeros_like(lse)
    for k_start, k_stop, hidden in tiles:
        own = slice(k_start, k_stop)
        shape = (units, group * rows, k_stop - k_start)
        weights, dscores = view_of(scratch[0], shape), view_of(scratch[1], shape)
        torch.bmm(q, k[:, own].transpose(1, 2), out=weights)
        weights.sub_(lse)
        if hidden is not None:
            weights.view(units, group, rows, -1).masked_fill_(hidden, -torch.inf)
        weights.exp_()
        du[:, own].baddbmm_(weights.transpose(1, 2), dout)
        torch.bmm(dout, u[:, own].transpose(1, 2), out=dscores)
        dscores.sub_(delta).mul_(weights)
        dlogits_rows.add_(dscores.sum(-1, keepdim=True))
        # q carries softmax_scale already.
        dk[:, own].baddbmm_(dscores.transpose(1, 2), q)
        dq_rows.baddbmm_(dscores, k[:, own])
    dq.add_(dq_rows.view(units, group, rows, head_dim))
    dlogits.add_(dlogits_rows.view(units, group, rows))


def whole_band(size: int) -> Band:
    """A hop: every key of the fibre is seen."""
    last = torch.full((size,), size - 1)
    return Band(last, torch.zeros_like(last), torch.arange(size))


def past_band(size: int, apart: int = 1, lo: Tensor | None = None) -> Band:
    """Keys at least `apart` places earlier, from `lo` `[size]` on: a branch of a coarse mode."""
    place = torch.arange(size)
    return Band(place - apart, torch.zeros_like(place) if lo is None else lo, place)


def hop_fwd(
    q: Tensor, k: Tensor, u: Tensor, mode: int, turning: ModeRotary
) -> tuple[Tensor, Tensor]:
    """(U_j in u.dtype `[b, s, h_u, d]`, lambda_j as fibres have rows); q, k rotated for `mode`."""
    grid = turning.grid
    fibres = Fibres(grid.modes[mode], grid.strides[mode])
    q = hop_queries(q, k.shape[2], grid)
    k, u = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, u))
    band, parts = whole_band(fibres.size), [fibres.of(x) for x in (q, k, u)]
    out, lam = softmax_fwd(parts, band, turning.softmax_scale)
    return fibres.joined(out, q.shape).to(u.dtype), lam


def hop_bwd(
    g: Tensor, qku: Sequence[Tensor], hopped: Sequence[Tensor], mode: int, turning: ModeRotary
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, du) of a hop. g: dU_j; hopped: U_j and lambda_j; qku: as given to `hop_fwd`."""
    (q, k, u), (u_next, lam), grid = qku, hopped, turning.grid
    shapes = (q.shape, k.shape, u.shape)
    fibres = Fibres(grid.modes[mode], grid.strides[mode])
    q = hop_queries(q, k.shape[2], grid)
    delta = fibres.rows(row_delta(g, u_next))
    k, u = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, u))
    parts = [fibres.of(x) for x in (q, k, u)]
    band = whole_band(fibres.size)
    grads = softmax_bwd(fibres.of(g), parts, lam, delta, band, turning.softmax_scale)
    dq, dk, du = (fibres.joined(x, q.shape) for x in grads[:3])
    dk, du = (
        x.unflatten(2, (shape[2], -1)).sum(3) for x, shape in zip((dk, du), shapes[1:], strict=True)
    )
    return hop_queries_bwd(dq, shapes[0][2]), dk, du


class Branch(NamedTuple):
    """What the rows of a branch are, and what they see; fibres None: the tokens as they are."""

    band: Band
    fibres: Fibres | None = None


def fine_branch(mode: int, index: Tensor, starts: Tensor, k_idx: Tensor, grid: ModeGrid) -> Branch:
    """Branch `mode`, not the coarsest, of tokens `index`, whole blocks of `grid.block`.

    starts: the first token of each one's document, a multiple of `grid.block`; k_idx: the tokens
    whose keys are at hand, read where mode 0 sees more than one block, else those of `index`.
    """
    size = grid.modes[mode]
    if mode == 0 and grid.local_blocks > 1:
        first = (index // size - grid.local_blocks + 1) * size
        return Branch(Band(index, torch.maximum(first, starts), k_idx))
    return Branch(past_band(size, min(mode, 1)), Fibres(size, grid.strides[mode]))


def coarsest_branch(starts: Tensor, grid: ModeGrid) -> Branch:
    """The last branch, over whole blocks; starts: as for `fine_branch`, of all tokens.

    Without modes it is the only one, over tokens, and a token sees itself.
    """
    lo = starts[:: grid.block] // grid.block
    apart = grid.local_blocks if grid.modes else 0
    return Branch(past_band(len(lo), apart, lo), Fibres(len(lo), grid.block))


def branch_fwd(qku: Sequence[Tensor], branch: Branch, softmax_scale: float) -> Partial:
    """The partial of a branch, its bias left out; q and k rotated for its mode."""
    band, fibres = branch
    if fibres is None:
        return softmax_fwd(qku, band, softmax_scale)
    out, lse = softmax_fwd([fibres.of(x) for x in qku], band, softmax_scale)
    return Partial(fibres.joined(out, qku[0].shape), fibres.joined_rows(lse, len(qku[0])))


def branch_bwd(
    dout: Tensor,
    qku: Sequence[Tensor],
    rows: tuple[Tensor, Tensor],
    branch: Branch,
    softmax_scale: float,
) -> Grads:
    """The gradients of a branch; rows: (lse - bias, delta) `[b, h, s]` of the whole row."""
    band, fibres = branch
    if fibres is None:
        return softmax_bwd(dout, qku, *rows, band, softmax_scale)
    lse, delta = (fibres.rows(x) for x in rows)
    parts = [fibres.of(x) for x in qku]
    grads = softmax_bwd(fibres.of(dout), parts, lse, delta, band, softmax_scale)
    dq, dk, du = (fibres.joined(x, like.shape) for x, like in zip(grads[:3], qku, strict=True))
    return Grads(dq, dk, du, fibres.joined_rows(grads.dlogits, len(dout)))


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """dout . out of every row: `[b, s, h, d]` -> `[b, h, s]`, in the wider of fp32 and theirs."""
    wide = wide_dtype(out.dtype)
    return (dout.to(wide) * out.to(wide)).sum(-1).transpose(1, 2)


def merge_branch(so_far: Partial | None, part: Partial, bias: Tensor, mode: int) -> Partial:
    """Branch `mode` merged into the finer ones, with its bias of `[len(modes), h]`."""
    if so_far is None:
        return part
    lse = part.lse + bias[mode - 1, :, None]
    out, lse = merge(so_far.out, so_far.lse, part.out, lse)
    return Partial(out, lse)


def mode_fwd(
    qku: Sequence[Tensor],
    branch: Branch,
    mode: int,
    turning: ModeRotary,
    so_far: Partial | None,
    bias: Tensor,
) -> tuple[Partial, Tensor | None, Tensor | None]:
    """(branch `mode` merged into so_far, U_j, lambda_j), None after the coarsest mode.

    qku: q and k rotated for the mode, U_{j-1}. so_far: its memory may be taken over.
    """
    done = merge_branch(so_far, branch_fwd(qku, branch, turning.softmax_scale), bias, mode)
    if mode == len(turning.grid.modes):
        return done, None, None
    return done, *hop_fwd(qku[0], qku[1], qku[2], mode, turning)


def mode_bwd(
    dout: Tensor, qku: Sequence[Tensor], rows: tuple[Tensor, Tensor], branch: Branch,
    hopped: Sequence[Tensor] | None, mode: int, turning: ModeRotary,
) -> Grads:  # fmt: skip
    """The gradients of a mode's branch, and of its hop. hopped: dU_j, U_j and lambda_j, if any."""
    grads = branch_bwd(dout, qku, rows, branch, turning.softmax_scale)
    if hopped is not None:
        more = hop_bwd(hopped[0], qku, hopped[1:], mode, turning)
        for total, one in zip(grads[:3], more, strict=True):
            total += one
    return grads
