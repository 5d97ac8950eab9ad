"""Attention methods of lcdist in plain torch, computed for some queries at a time.

Exported models carry a copy of this file, so it imports only torch. Queries `[b, s, h, d]` and keys
and values `[b, s, h_kv, d]` are passed without rotation, at positions 0 to s-1. Sums are computed
in float32 or better. Memory grows linearly with s.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Maximum number of scores in memory: 64 MiB in float32.
SCORES_AT_ONCE = 2**24
Rotate = Callable[..., Tensor]
Options = Mapping[str, Any]


def attend(
    options: Options,
    qkv: tuple[Tensor, Tensor, Tensor],
    rotate: Rotate,
    branch_bias: Tensor | None = None,
) -> Tensor:
    """Compute attention in the shape and dtype of the queries.

    Args:
        options: "method" and the method's options.
        qkv: queries, keys and values.
        rotate: rotate(x, positions) rotates x `[b, s, h, d]`.
        branch_bias: learned bias `[modes, h]` of tensorized attention.

    Raises:
        ValueError: the method is unknown.
    """
    if options["method"] not in METHODS:
        raise ValueError(f"method {options['method']!r}: must be one of {', '.join(METHODS)}")
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in qkv)
    bias = () if branch_bias is None else (branch_bias.to(q),)
    return METHODS[options["method"]](q, k, v, rotate, options, *bias).to(qkv[0].dtype)


def _full(q: Tensor, k: Tensor, v: Tensor, rotate: Rotate, options: Options) -> Tensor:
    """Compute causal softmax attention.

    length_scale: scores of a query that sees n tokens are multiplied by ln(n) / ln(length_scale).
    """
    if options["length_scale"] is not None:
        seen = torch.arange(1, q.shape[1] + 1, device=q.device).double()
        q = q * (seen.log() / math.log(options["length_scale"])).to(q)[:, None, None]
    return _softmax(rotate(q), rotate(k), v)


def _coca(q: Tensor, t: Tensor, v: Tensor, rotate: Rotate, options: Options) -> Tensor:
    """Compute CoCA (arXiv:2309.08646) with keys collinear to queries.

    tau = relu(mean of t's two halves). slack: (q * R q) . R [tau ; tau]. strict:
    R [|q|^2 ; 0] . R [tau ; 0], pair by pair.
    """
    tau = (0.5 * (t[..., : t.shape[-1] // 2] + t[..., t.shape[-1] // 2 :])).relu()
    if options["variant"] == "slack":
        return _softmax(q * rotate(q), rotate(torch.cat((tau, tau), -1)), v)
    a, b = q.chunk(2, -1)
    square = a.square() + b.square()
    queries, keys = (torch.cat((x, torch.zeros_like(x)), -1) for x in (square, tau))
    return _softmax(rotate(queries), rotate(keys), v)


def _lssar(q: Tensor, k: Tensor, v: Tensor, rotate: Rotate, options: Options) -> Tensor:
    """Compute length-scaled softplus attention (arXiv:2501.13428), re-weighted or not.

    f = softplus(ln(d) ln(N) cos(q, k)) over the N visible keys; weights f, or relu(f - mean)^p.
    """
    q, k = (x * x.square().sum(-1, keepdim=True).clamp_min(1e-12).rsqrt() for x in (q, k))
    q, k, out = rotate(q), rotate(k), []
    for start, stop in _spans(q, q.shape[1]):
        counts = torch.arange(start + 1, stop + 1, device=q.device)[:, None]
        scale = (math.log(q.shape[3]) * counts.double().log()).to(q)
        scores = _scores(q[:, start:stop], k[:, :stop]) * scale
        hidden = torch.arange(stop, device=q.device) >= counts
        f = torch.logaddexp(scores, torch.zeros_like(scores)).masked_fill(hidden, 0.0)
        if options["reweight"]:
            share = (counts.double().reciprocal() * (counts > options["exempt_rows"])).to(q)
            mean, top = f.sum(-1, keepdim=True) * share, f.amax(-1, keepdim=True)
            spread = (top - mean).detach()
            # In a row of equal scores, only rounding lies above the mean.
            flat = spread <= 64 * torch.finfo(f.dtype).eps * top
            f = (f - mean).relu() / spread.masked_fill(flat, torch.inf)
            is_zero = f == 0
            f = f.masked_fill(is_zero, 1.0).pow(options["power"]).masked_fill(is_zero, 0.0)
        total = f.sum(-1, keepdim=True)
        out.append(_mix(f / total.masked_fill(total == 0, 1.0), v[:, :stop]))
    return torch.cat(out, 1)


def _landmark(q: Tensor, k: Tensor, v: Tensor, rotate: Rotate, options: Options) -> Tensor:
    """Compute landmark attention (arXiv:2305.16300); a block's last token is its landmark.

    A query attends to its own block without the landmark, and to each past block through a gate,
    the landmark's logit. A softmax inside the past block distributes the gate's weight.
    """
    size, seqlen = options["block_size"], q.shape[1]
    blocks = -(-seqlen // size)
    q, k, scale = rotate(q), rotate(k), q.shape[3] ** -0.5
    padding = (0, 0, 0, 0, 0, blocks * size - seqlen)
    k, v = torch.nn.functional.pad(k, padding), torch.nn.functional.pad(v, padding)
    index, out = torch.arange(blocks * size, device=q.device), []
    unit = options["select_tokens"] if options["top_k"] is not None else seqlen
    # Whole units; a long unit is computed in several steps.
    for first, last in _spans(q, blocks * size, unit):
        selected = (
            None if options["top_k"] is None else _select_blocks(q, k, options, (first, last))
        )
        for start, stop in _spans(q[:, first:last], blocks * size):
            rows = torch.arange(first + start, first + stop, device=q.device)[:, None]
            seen = -(-(first + stop) // size)  # blocks that one of these rows may attend to
            keys, values = k[:, : seen * size], v[:, : seen * size]
            scores = _scores(q[:, first + start : first + stop] * scale, keys)
            scores = scores.unflatten(-1, (seen, size))
            slots = index[: seen * size]
            local = (slots // size == rows // size) & (slots <= rows) & (slots % size != size - 1)
            past = index[:seen] < rows // size
            if selected is not None:
                row_blocks = selected[:, :, rows[:, 0] // unit - first // unit, :seen]
                past = past & row_blocks.repeat_interleave(q.shape[2] // k.shape[2], 1)
            gates = scores[..., -1].masked_fill(~past, -torch.inf)
            plain = scores.flatten(-2).masked_fill(~local, -torch.inf)
            weights = torch.cat((gates, plain), -1).softmax(-1)
            inside = scores[..., :-1].softmax(-1)
            inside = torch.cat((inside, torch.zeros_like(inside[..., :1])), -1)
            blockwise = (weights[..., :seen, None] * inside).flatten(-2)
            out.append(_mix(blockwise + weights[..., seen:], values))
    return torch.cat(out, 1)


@torch.no_grad()
def _select_blocks(q: Tensor, k: Tensor, options: Options, span: tuple[int, int]) -> Tensor:
    """Select past blocks for the selection units in `span`: bool `[b, h_kv, units, blocks]`.

    A key head selects the blocks of greatest probability among past landmarks, as the maximum over
    the unit's rows and the head's queries. Of probabilities equal in float32, the first win.
    """
    size, unit = options["block_size"], options["select_tokens"]
    landmarks = k[:, size - 1 :: size].double() * q.shape[3] ** -0.5
    number, count = (
        torch.arange(landmarks.shape[1], device=q.device),
        -((span[0] - span[1]) // unit),
    )
    cost = q.new_full((len(q), k.shape[2], count, len(number)), torch.inf, dtype=torch.float32)
    for start, stop in _spans(q[:, span[0] : span[1]], len(number)):
        rows = torch.arange(span[0] + start, span[0] + stop, device=q.device)
        hidden = number >= rows[:, None] // size
        scores = _scores(q[:, span[0] + start : span[0] + stop].double(), landmarks)
        scores = scores.masked_fill(hidden, -torch.inf)
        rows_cost = 1 - (scores - scores.logsumexp(-1, keepdim=True))
        rows_cost = rows_cost.masked_fill(hidden, torch.inf)
        rows_cost = rows_cost.unflatten(1, (k.shape[2], -1)).amin(2).float()
        units = ((rows - span[0]) // unit)[:, None].expand_as(rows_cost)
        cost.scatter_reduce_(2, units, rows_cost, "amin")
    best = cost.sort(dim=-1, stable=True).indices[..., : options["top_k"]]
    return torch.zeros_like(cost, dtype=torch.bool).scatter(-1, best, True)


def _tensorized(
    q: Tensor, k: Tensor, v: Tensor, rotate: Rotate, options: Options, *bias: Tensor
) -> Tensor:
    """Compute lexicographic tensorized attention (after arXiv:2410.20926).

    A position has one digit per mode, finest first. A fibre of a mode is the tokens that differ in
    its digit alone. U_0 = v and U_j = softmax(S_j | fibre of mode j) U_{j-1}. Branch 0 of a query
    attends to its own block and those just before. Branch j reads U_{j-1} at the keys of its fibre
    whose digit is smaller by at least local_blocks. One softmax spans all branches; branch_bias is
    added to the branches above 0.
    """
    fold, group = _Fold(options, q.shape[1]), q.shape[2] // k.shape[2]
    by_key_head = options["hop_heads"] == "kv" or (options["hop_heads"] == "auto" and group > 2)
    queries, keys, values = [], [], [v]
    for mode in range(fold.last + 1):
        angle = fold.angle(mode)
        queries.append(rotate(q, angle))
        keys.append(rotate(k, angle))
        if mode < fold.last:
            hop = queries[mode]
            hop = hop.unflatten(2, (k.shape[2], -1)).mean(3) if by_key_head else hop
            values.append(_softmax(hop, keys[mode], values[mode], partial(fold.fibre, mode)))
    out = []
    for start, stop in _spans(q, q.shape[1]):
        masks = [fold.branch(mode, start, stop).to(q.device) for mode in range(fold.last + 1)]
        logits = torch.full((), -torch.inf, dtype=q.dtype, device=q.device)
        for mode, mask in enumerate(masks):
            scores = _scores(queries[mode][:, start:stop] * q.shape[3] ** -0.5, keys[mode])
            scores = scores + bias[0][mode - 1, :, None, None] if mode else scores
            logits = torch.where(mask, scores, logits)
        weights = logits.softmax(-1)
        parts = [_mix(weights * mask, u) for mask, u in zip(masks, values, strict=True)]
        out.append(torch.stack(parts).sum(0))
    return torch.cat(out, 1)


class _Fold:
    """Text positions folded into modes, finest first; the coarsest, `last`, is unbounded."""

    def __init__(self, options: Options, seqlen: int) -> None:
        self.modes, self.pe = options["modes"], options["pe"]
        self.last, self.positions = len(self.modes), torch.arange(seqlen)
        self.near = options["local_blocks"] if self.modes else 1

    def digit(self, mode: int) -> Tensor:
        """Return each position's digit of a mode."""
        digit = self.positions // math.prod(self.modes[:mode])
        return digit % self.modes[mode] if mode < self.last else digit

    def angle(self, mode: int) -> Tensor:
        """Return the positions that a mode rotates by."""
        is_global = self.pe == "global" or (mode == 0 and self.near > 1)
        return self.positions if is_global else self.digit(mode)

    def fibre(self, mode: int, start: int, stop: int) -> Tensor:
        """Return whether a token shares the fibre of rows start to stop, bool `[rows, s]`."""
        stride = math.prod(self.modes[:mode])
        # The position without the digit of this mode.
        rest = self.positions - self.digit(mode) * stride
        return rest[start:stop, None] == rest

    def branch(self, mode: int, start: int, stop: int) -> Tensor:
        """Return whether rows start to stop read a token in branch `mode`, bool `[rows, s]`."""
        if mode:
            digit = self.digit(mode)
            return self.fibre(mode, start, stop) & (digit <= digit[start:stop, None] - self.near)
        block = self.positions // (self.modes[0] if self.modes else len(self.positions))
        future = self.positions > self.positions[start:stop, None]
        return ~future & (block > block[start:stop, None] - self.near)


METHODS: dict[str, Callable[..., Tensor]] = {"full": _full, "coca": _coca, "lssar": _lssar}
METHODS |= {"landmark": _landmark, "tensorized": _tensorized}


def _softmax(q: Tensor, k: Tensor, v: Tensor, mask: Callable[..., Tensor] | None = None) -> Tensor:
    """Compute softmax attention without rotation, causal or where mask(start, stop) is True."""
    out = []
    for start, stop in _spans(q, k.shape[1]):
        index = torch.arange(stop if mask is None else k.shape[1])
        visible = index <= index[start:stop, None] if mask is None else mask(start, stop)
        scores = _scores(q[:, start:stop] * q.shape[3] ** -0.5, k[:, : len(index)])
        scores = scores.masked_fill(~visible.to(q.device), -torch.inf)
        out.append(_mix(scores.softmax(-1), v[:, : len(index)]))
    return torch.cat(out, 1)


def _spans(q: Tensor, keys: int, unit: int = 1) -> Iterator[tuple[int, int]]:
    """Yield intervals of q's rows, in whole units, with at most SCORES_AT_ONCE scores each."""
    step = max(1, SCORES_AT_ONCE // (q.shape[0] * q.shape[2] * max(1, keys)) // unit) * unit
    for start in range(0, q.shape[1], step):
        yield start, min(start + step, q.shape[1])


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Return q . k, `[b, h, s, t]`; a key head serves a group of neighbouring query heads."""
    q = q.unflatten(2, (k.shape[2], -1))
    return torch.einsum("bskgd,btkd->bkgst", q, k).flatten(1, 2)


def _mix(weights: Tensor, v: Tensor) -> Tensor:
    """Return weights `[b, h, s, t]` times values, `[b, s, h, d]`."""
    weights = weights.unflatten(1, (v.shape[2], -1))
    return torch.einsum("bkgst,btkd->bskgd", weights, v).flatten(2, 3)
