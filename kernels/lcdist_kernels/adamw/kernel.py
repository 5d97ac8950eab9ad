"""A step of AdamW in one launch over a table of addresses; the formulas are in `reference.py`.

    program: a piece of PIECE elements of one tensor, loop over tiles of BLOCK

Each element is read and written once: 16 + 12 bytes of fp32, and the weight. The tables are made
again only when a tensor has another address.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcdist_kernels.adamw.tensors import Hyper, Tensors
from lcdist_kernels.triton_common import launch_context

PIECE = 2**14
BLOCK = 1024
WARPS = 4
# Gradient, master, two moments and the weight.
COLUMNS = tl.constexpr(5)
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class _Table(NamedTuple):
    """Tables of a launch on the device.

    Attributes:
        addresses: int64 `[tensors, 5]`; 0 for a weight of None.
        sizes: int64 `[tensors]`, elements.
        rates: fp32 `[tensors, 2]`: weight decay and ratio of the learning rate.
        pieces: int32 `[programs, 2]`: a tensor's number, and a piece's number in it.
        is_aligned: whether all addresses are multiples of 16.
    """

    addresses: Tensor
    sizes: Tensor
    rates: Tensor
    pieces: Tensor
    is_aligned: bool


# Those of some optimizers, by everything that is in them: a warm step only looks its table up.
_TABLES: dict[tuple[Any, ...], _Table] = {}
TABLES_KEPT = 4


@triton.jit
def _pointer(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Return an address as a pointer to elements of a type."""
    p = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        # Otherwise no load would be a vector: the compiler cannot know where addresses come from.
        # Four elements each, also of two bytes, so that no value changes its thread.
        p = tl.multiple_of(p, 4 * dtype.primitive_bitwidth // 8)  # pyright: ignore[reportAttributeAccessIssue]
    return p


@triton.jit
def _load(p, o, m, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(p + o)
    else:
        return tl.load(p + o, mask=m, other=0.0)


@triton.jit
def _store(p, o, b, m, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(p + o, b)
    else:
        tl.store(p + o, b, mask=m)


@triton.jit
def _tile(
    p_gradient, p_master, p_first, p_second, p_weight, has_weight, start, stop,
    scale, rate, decay, rest1, rest2, correction1, root2, eps,
    WEIGHT: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update the elements from start to stop, at most BLOCK of them; WHOLE: just as many."""
    o = start + tl.arange(0, BLOCK)
    m = o < stop
    b_g = _load(p_gradient, o, m, WHOLE) * scale
    b_w = _load(p_master, o, m, WHOLE)
    b_first = _load(p_first, o, m, WHOLE)
    b_second = _load(p_second, o, m, WHOLE)
    b_first += rest1 * (b_g - b_first)
    b_second += rest2 * (b_g * b_g - b_second)
    # Subtracted: 1 - rate * decay, rounded, would be off by the same amount in every step.
    b_w -= rate * decay * b_w
    b_w -= rate * correction1 * b_first / (tl.sqrt(b_second) * root2 + eps)
    _store(p_master, o, b_w, m, WHOLE)
    _store(p_first, o, b_first, m, WHOLE)
    _store(p_second, o, b_second, m, WHOLE)
    if has_weight:
        _store(p_weight, o, b_w.to(WEIGHT), m, WHOLE)


@triton.jit
def _adamw_kernel(
    addresses, sizes, rates, pieces, totals,
    lr, rest1, rest2, correction1, root2, eps, clip_norm,
    WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update a piece of a tensor, unless the totals say that the step is refused."""
    i_piece = tl.program_id(0)
    loss, tokens = tl.load(totals), tl.load(totals + 1)
    squares, all_squares = tl.load(totals + 2), tl.load(totals + 3)
    # Infinity minus itself is NaN, which equals nothing.
    is_finite = (loss - loss == 0.0) & (all_squares - all_squares == 0.0)
    if is_finite & (tokens > 0.0):
        scale = 1.0 / tokens
        if clip_norm > 0.0:
            # The greater divisor: a norm of 0 divides nothing.
            scale = 1.0 / tl.maximum(tokens, tl.sqrt(squares) / clip_norm)
        scale = scale.to(tl.float32)
        i_tensor = tl.load(pieces + 2 * i_piece).to(tl.int64)
        start = tl.load(pieces + 2 * i_piece + 1).to(tl.int64) * PIECE
        stop = tl.minimum(start + PIECE, tl.load(sizes + i_tensor))
        decay = tl.load(rates + 2 * i_tensor)
        rate = lr * tl.load(rates + 2 * i_tensor + 1)
        p = addresses + COLUMNS * i_tensor
        p_gradient = _pointer(tl.load(p), tl.float32, ALIGNED)
        p_master = _pointer(tl.load(p + 1), tl.float32, ALIGNED)
        p_first = _pointer(tl.load(p + 2), tl.float32, ALIGNED)
        p_second = _pointer(tl.load(p + 3), tl.float32, ALIGNED)
        weight = tl.load(p + 4)
        p_weight = _pointer(weight, WEIGHT, ALIGNED)
        last = start + (stop - start) // BLOCK * BLOCK
        for at in range(start, last, BLOCK):
            _tile(
                p_gradient, p_master, p_first, p_second, p_weight, weight != 0, at, stop,
                scale, rate, decay, rest1, rest2, correction1, root2, eps,
                WEIGHT, True, BLOCK,
            )  # fmt: skip
        if last < stop:
            _tile(
                p_gradient, p_master, p_first, p_second, p_weight, weight != 0, last, stop,
                scale, rate, decay, rest1, rest2, correction1, root2, eps,
                WEIGHT, False, BLOCK,
            )  # fmt: skip


def update(tensors: Tensors, totals: Tensor, hyper: Hyper) -> None:
    """Update in place by one launch for each dtype of weights, as `op.adamw_` says."""
    kinds = [torch.float32 if x is None else x.dtype for x in tensors.weights]
    low = [kind for kind in dict.fromkeys(kinds) if kind != torch.float32] or [torch.float32]
    for kind in low:
        # Masters that are the weights join the first launch.
        joins = (kind, torch.float32) if kind == low[0] else (kind,)
        some = tensors.some([i for i, each in enumerate(kinds) if each in joins])
        _launch(some, kind, totals, hyper)


def _launch(tensors: Tensors, kind: torch.dtype, totals: Tensor, hyper: Hyper) -> None:
    table = _table_of(tensors, totals.device)
    if not len(table.pieces):
        return
    correction1, correction2 = (1 - beta**hyper.step for beta in (hyper.beta1, hyper.beta2))
    with launch_context(totals):
        _adamw_kernel[(len(table.pieces),)](
            table.addresses, table.sizes, table.rates, table.pieces, totals,
            hyper.lr, 1 - hyper.beta1, 1 - hyper.beta2, 1 / correction1, correction2**-0.5,
            hyper.eps, float(hyper.clip_norm),
            WEIGHT=TYPES[kind], ALIGNED=table.is_aligned, PIECE=PIECE, BLOCK=BLOCK,
            num_warps=WARPS,
        )  # fmt: skip


def _table_of(tensors: Tensors, device: torch.device) -> _Table:
    """Return the tables of these tensors, made again only when one of them has moved."""
    columns = (tensors.gradients, tensors.masters, tensors.first, tensors.second, tensors.weights)
    addresses = tuple(
        tuple(0 if x is None else x.data_ptr() for x in row) for row in zip(*columns, strict=True)
    )
    sizes = tuple(x.numel() for x in tensors.masters)
    key = (addresses, sizes, tuple(tensors.decays), tuple(tensors.lr_ratios), device)
    if key not in _TABLES:
        while len(_TABLES) >= TABLES_KEPT:
            _TABLES.pop(next(iter(_TABLES)))
        _TABLES[key] = _make(addresses, sizes, tensors, device)
    return _TABLES[key]


def _make(
    addresses: tuple[tuple[int, ...], ...],
    sizes: tuple[int, ...],
    tensors: Tensors,
    device: torch.device,
) -> _Table:
    rates = list(zip(tensors.decays, tensors.lr_ratios, strict=True))
    of_sizes = torch.tensor(sizes)
    counts = (of_sizes + PIECE - 1) // PIECE
    owners = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    first_pieces = counts.cumsum(0) - counts
    numbers = torch.arange(len(owners)) - first_pieces[owners]
    return _Table(
        torch.tensor(addresses).to(device),
        of_sizes.to(device),
        torch.tensor(rates, dtype=torch.float32).to(device),
        torch.stack([owners, numbers], 1).to(torch.int32).to(device),
        all(address % 16 == 0 for row in addresses for address in row),
    )
