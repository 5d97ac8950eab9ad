"""Tensorized attention mode by mode in torch: linear memory, gradients written by hand.

A fibre of mode j is strided rows of a contiguous tensor. So a reshape turns fibres into rows of a
batch, and the s_j offsets into heads; every branch and hop is then softmax attention with its own
band. Let lse and delta = dout . out be of the whole row, out over all branches (FlashAttention-2,
arXiv:2307.08691), and G be dU_j. Branch j and the hop of mode j have

    p = exp(s + bias_j - lse)           f = exp(s - lambda_j)
    ds = p (dout . u - delta) + f (G . u - G . U_j)          dbias_j = sum of the first
    dU_{j-1} = p^T dout + f^T G         dq = softmax_scale ds k,   dk = softmax_scale ds^T q

from the coarsest mode to the finest. No weights are saved, only U_j, lambda_j, out and lse.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lcdist_kernels.common import TensorNotes, wide_dtype
from lcdist_kernels.full import full_fwd
from lcdist_kernels.full.tiled import add_grads
from lcdist_kernels.partial import merge
from lcdist_kernels.rotary import Rotary
from lcdist_kernels.tensorized.grid import ModeGrid
from lcdist_kernels.tiles import fold, unfold


class Band(NamedTuple):
    """Limits of queries and numbers of keys, int64 on the CPU: q_lo <= k_idx <= q_idx."""

    q_idx: Tensor
    q_lo: Tensor
    k_idx: Tensor


class Partial(NamedTuple):
    """out `[b, s, h, d]` and lse `[b, h, s]` over some of the keys, in fp32 or float64."""

    out: Tensor
    lse: Tensor


class Grads(NamedTuple):
    """Gradients of a branch or hop: like q, k and u, and row sums of the logits' `[b, h, s]`."""

    dq: Tensor
    dk: Tensor
    du: Tensor
    dlogits: Tensor


_OPPOSITES = TensorNotes()


@dataclass(frozen=True)
class ModeRotary:
    """Rotation of the tokens at hand for each mode, and the scale of scores.

    angles: by mode, what `ModeGrid.angle` says of the positions, if it is known.
    """

    grid: ModeGrid
    rotary: Rotary | None
    positions: Tensor
    softmax_scale: float
    angles: Sequence[Tensor] = ()

    def angle(self, mode: int) -> Tensor:
        """Return what `mode` rotates each token by."""
        return self.angles[mode] if self.angles else self.grid.angle(self.positions, mode)

    def rotate(self, x: Tensor, mode: int) -> Tensor:
        """Rotate `x` `[b, s, h, d]` as `mode` does."""
        if self.rotary is None:
            return x
        return self.rotary.rotate(x, self.angle(mode))

    def rotate_back(self, dx: Tensor, mode: int) -> Tensor:
        """Apply the adjoint of `rotate`: the opposite angle."""
        if self.rotary is None:
            return dx
        angle = self.angle(mode)
        return self.rotary.rotate(dx, _OPPOSITES.find(angle, None, lambda: -angle))


@dataclass(frozen=True)
class Fibres:
    """Fibres of `size` tokens, `stride` apart, that the tokens at hand consist of."""

    size: int
    stride: int

    def split(self, x: Tensor) -> Tensor:
        """[b, s, h, d] -> [b * outer, size, stride * h, d]: a view where x is contiguous."""
        return x.reshape(-1, self.size, self.stride * x.shape[2], x.shape[3])

    def split_rows(self, x: Tensor) -> Tensor:
        """[b, h, s] -> [b * outer, stride * h, size], in the order of `split`."""
        parts = x.unflatten(2, (-1, self.size, self.stride)).permute(0, 2, 4, 1, 3)
        return parts.reshape(-1, self.stride * x.shape[1], self.size)

    def join(self, x: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """Inverse of `split`; shape: [b, s, h, d]."""
        return x.reshape(shape)

    def join_rows(self, x: Tensor, batch: int) -> Tensor:
        """Inverse of `split_rows`."""
        parts = x.unflatten(0, (batch, -1)).unflatten(2, (self.stride, -1))
        return parts.permute(0, 3, 1, 4, 2).flatten(2)


def hop_queries(q: Tensor, nheads_kv: int, grid: ModeGrid) -> Tensor:
    """Return the queries of hidden hops: q, or the mean over each group, at least fp32."""
    if grid.hop_heads == "q":
        return q
    return q.to(wide_dtype(q.dtype)).unflatten(2, (nheads_kv, -1)).mean(3)


def hop_queries_bwd(dq: Tensor, nheads: int) -> Tensor:
    """Return the gradient of q from that of `hop_queries`: `[b, s, nheads, d]`."""
    group = nheads // dq.shape[2]
    return dq if group == 1 else (dq / group).repeat_interleave(group, 2)


def softmax_fwd(qku: Sequence[Tensor], band: Band, softmax_scale: float) -> Partial:
    """Return `full_fwd` of q, k and u, where u may have a multiple of k's heads.

    Zero heads are legal.
    """
    q, k, u = qku
    if not q.numel():
        out = q.new_empty(q.shape, dtype=wide_dtype(q.dtype))
        return Partial(out, out.new_empty(q.shape[0], q.shape[2], q.shape[1]))
    # The mean query may be wider than a bf16 key; `full_fwd` converts each on its own.
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
    """Return the share of the gradients through these keys, at least fp32.

    Args:
        qku: rotated q `[b, s_q, h, d]`, k `[b, s_k, h_k, d]`, u `[b, s_k, h_u, d]`; h_u is a
            multiple of h_k.
        lse, delta: `[b, h, s_q]`, of the whole row, which may include other keys.
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
    add_grads((dout, q, lse, delta), (k, u), (dq, dk, du), band, softmax_scale, dlogits)
    dk_shape = (*shapes[1][:2], shapes[2][2], shapes[1][3])
    dk = unfold(dk[:, None], dk_shape).unflatten(2, (-1, repeats)).sum(3)
    dlogits = dlogits.reshape(shapes[0][0], shapes[0][2], shapes[0][1])
    return Grads(unfold(dq, shapes[0]), dk, unfold(du[:, None], shapes[2]), dlogits)


def whole_band(size: int) -> Band:
    """Return the band of a hop: every key of the fibre is visible."""
    last = torch.full((size,), size - 1)
    return Band(last, torch.zeros_like(last), torch.arange(size))


def past_band(size: int, distance: int = 1, lo: Tensor | None = None) -> Band:
    """Return the band of a coarse branch: keys at least `distance` places earlier.

    lo: the first visible key of each query `[size]`; default 0.
    """
    offset = torch.arange(size)
    return Band(offset - distance, torch.zeros_like(offset) if lo is None else lo, offset)


def hop_fwd(
    q: Tensor, k: Tensor, u: Tensor, mode: int, mode_rotary: ModeRotary
) -> tuple[Tensor, Tensor]:
    """Return (U_j in u.dtype `[b, s, h_u, d]`, lambda_j in the order of `split_rows`).

    q, k: rotated for `mode`.
    """
    grid = mode_rotary.grid
    fibres = Fibres(grid.modes[mode], grid.strides[mode])
    q = hop_queries(q, k.shape[2], grid)
    k, u = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, u))
    band, parts = whole_band(fibres.size), [fibres.split(x) for x in (q, k, u)]
    out, hop_lse = softmax_fwd(parts, band, mode_rotary.softmax_scale)
    return fibres.join(out, q.shape).to(u.dtype), hop_lse


def hop_bwd(
    du_next: Tensor,
    qku: Sequence[Tensor],
    hop_saved: Sequence[Tensor],
    mode: int,
    mode_rotary: ModeRotary,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, du) of a hop.

    du_next: dU_j. hop_saved: U_j and lambda_j. qku: as given to `hop_fwd`.
    """
    (q, k, u), (u_next, hop_lse), grid = qku, hop_saved, mode_rotary.grid
    shapes = (q.shape, k.shape, u.shape)
    fibres = Fibres(grid.modes[mode], grid.strides[mode])
    q = hop_queries(q, k.shape[2], grid)
    delta = fibres.split_rows(row_delta(du_next, u_next))
    k, u = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, u))
    parts = [fibres.split(x) for x in (q, k, u)]
    band = whole_band(fibres.size)
    grads = softmax_bwd(
        fibres.split(du_next), parts, hop_lse, delta, band, mode_rotary.softmax_scale
    )
    dq, dk, du = (fibres.join(x, q.shape) for x in grads[:3])
    dk, du = (
        x.unflatten(2, (shape[2], -1)).sum(3) for x, shape in zip((dk, du), shapes[1:], strict=True)
    )
    return hop_queries_bwd(dq, shapes[0][2]), dk, du


class Branch(NamedTuple):
    """Rows of a branch and the keys they see; fibres None: the tokens as they are."""

    band: Band
    fibres: Fibres | None = None


def fine_branch(mode: int, index: Tensor, starts: Tensor, k_idx: Tensor, grid: ModeGrid) -> Branch:
    """Return branch `mode`, not the coarsest, of tokens `index`, whole blocks of `grid.block`.

    Args:
        starts: the first token of each one's document, a multiple of `grid.block`.
        k_idx: tokens whose keys are at hand, where mode 0 sees more than one block; else unused.
    """
    size = grid.modes[mode]
    if mode == 0 and grid.local_blocks > 1:
        first = (index // size - grid.local_blocks + 1) * size
        return Branch(Band(index, torch.maximum(first, starts), k_idx))
    return Branch(past_band(size, min(mode, 1)), Fibres(size, grid.strides[mode]))


def coarsest_branch(starts: Tensor, grid: ModeGrid) -> Branch:
    """Return the last branch, over whole blocks; starts: of all tokens, as in `fine_branch`.

    Without modes it is the only one, over tokens, and a token sees itself.
    """
    lo = starts[:: grid.block] // grid.block
    distance = grid.local_blocks if grid.modes else 0
    return Branch(past_band(len(lo), distance, lo), Fibres(len(lo), grid.block))


def branch_fwd(qku: Sequence[Tensor], branch: Branch, softmax_scale: float) -> Partial:
    """Return the partial of a branch without its bias; q and k are rotated for its mode."""
    band, fibres = branch
    if fibres is None:
        return softmax_fwd(qku, band, softmax_scale)
    out, lse = softmax_fwd([fibres.split(x) for x in qku], band, softmax_scale)
    return Partial(fibres.join(out, qku[0].shape), fibres.join_rows(lse, len(qku[0])))


def branch_bwd(
    dout: Tensor,
    qku: Sequence[Tensor],
    row_stats: tuple[Tensor, Tensor],
    branch: Branch,
    softmax_scale: float,
) -> Grads:
    """Return the gradients of a branch; row_stats: (lse - bias, delta) `[b, h, s]`."""
    band, fibres = branch
    if fibres is None:
        return softmax_bwd(dout, qku, *row_stats, band, softmax_scale)
    lse, delta = (fibres.split_rows(x) for x in row_stats)
    parts = [fibres.split(x) for x in qku]
    grads = softmax_bwd(fibres.split(dout), parts, lse, delta, band, softmax_scale)
    dq, dk, du = (fibres.join(x, like.shape) for x, like in zip(grads[:3], qku, strict=True))
    return Grads(dq, dk, du, fibres.join_rows(grads.dlogits, len(dout)))


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """Return dout . out of every row: `[b, s, h, d]` -> `[b, h, s]`, at least fp32."""
    wide = wide_dtype(out.dtype)
    return (dout.to(wide) * out.to(wide)).sum(-1).transpose(1, 2)


def merge_branch(previous: Partial | None, part: Partial, bias: Tensor, mode: int) -> Partial:
    """Merge branch `mode` into the finer ones, with its bias of `[len(modes), h]`."""
    if previous is None:
        return part
    lse = part.lse + bias[mode - 1, :, None]
    out, lse = merge(previous.out, previous.lse, part.out, lse)
    return Partial(out, lse)


class Saved(NamedTuple):
    """Results of a forward pass, kept for the backward.

    Attributes:
        out: `[b, s, h, d]` in q's dtype.
        lse: `[b, h, s]`, at least fp32.
        values: v and the U_j. lambdas: the lambda_j, in a layout of the implementation's own.
    """

    out: Tensor
    lse: Tensor
    values: list[Tensor]
    lambdas: list[Tensor]


class Branches(Protocol):
    """Give the branches of a plan to `whole_fwd` and `whole_bwd`."""

    @property
    def branches(self) -> list[Branch]: ...


def whole_fwd(
    qkv: Sequence[Tensor], bias: Tensor, plan: Branches, mode_rotary: ModeRotary
) -> Saved:
    """Return attention of a whole sequence of whole blocks; bias: `[len(modes), h]`."""
    (q, k, v), scale = qkv, mode_rotary.softmax_scale
    values, lambdas, partial = [v], [], None
    for mode, branch in enumerate(plan.branches):
        qku = (mode_rotary.rotate(q, mode), mode_rotary.rotate(k, mode), values[-1])
        partial = merge_branch(partial, branch_fwd(qku, branch, scale), bias, mode)
        if mode < len(mode_rotary.grid.modes):
            u_next, hop_lse = hop_fwd(*qku, mode, mode_rotary)
            values.append(u_next)
            lambdas.append(hop_lse)
    assert partial is not None, "there is always a branch"
    return Saved(partial.out.to(q.dtype), partial.lse, values, lambdas)


def whole_bwd(
    dout: Tensor,
    qk: Sequence[Tensor],
    saved: Saved,
    bias: Tensor,
    plan: Branches,
    mode_rotary: ModeRotary,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and bias; `saved` is what `whole_fwd` returned."""
    (q, k), (out, lse, values, lambdas), scale = qk, saved, mode_rotary.softmax_scale
    delta = row_delta(dout, out)
    dq, dk = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k))
    dbias, du_next = torch.zeros_like(bias), None
    for mode, branch in reversed(list(enumerate(plan.branches))):
        qku = (mode_rotary.rotate(q, mode), mode_rotary.rotate(k, mode), values[mode])
        row_stats = (lse if mode == 0 else lse - bias[mode - 1, :, None], delta)
        grads = branch_bwd(dout, qku, row_stats, branch, scale)
        if du_next is not None:
            hop_saved = (values[mode + 1], lambdas[mode])
            more = hop_bwd(du_next, qku, hop_saved, mode, mode_rotary)
            for total, one in zip(grads[:3], more, strict=True):
                total += one
        if mode:
            dbias[mode - 1] = grads.dlogits.sum((0, 2))
        dq += mode_rotary.rotate_back(grads.dq, mode)
        dk += mode_rotary.rotate_back(grads.dk, mode)
        du_next = grads.du
    assert du_next is not None, "there is always a branch"
    return dq.to(q.dtype), dk.to(k.dtype), du_next.to(q.dtype), dbias
