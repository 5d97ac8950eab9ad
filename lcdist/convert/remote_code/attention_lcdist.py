"""The attention of models that lcdist trained, in plain torch: formulas, some queries at a time.

A copy of this file lies beside the weights of an exported model, so it needs torch alone. Queries
`[b, s, h, d]`, keys and values `[b, s, h_kv, d]` arrive un-rotated and stand at positions 0 to s-1;
sums are taken in float32 at least; memory grows with s, never with its square.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Scores that are held at once: 64 MiB in float32.
SCORES_AT_ONCE = 2**24
Rotate = Callable[..., Tensor]


def attend(
    asked: Mapping[str, Any],
    qkv: tuple[Tensor, Tensor, Tensor],
    rotate: Rotate,
    branch_bias: Tensor | None = None,
) -> Tensor:
    """out, like the queries. asked: "method" and its options.

    rotate(x, positions) turns x `[b, s, h, d]`. branch_bias: what tensorized attention learnt.
    Raises ValueError for a method that is not known.
    """
    if asked["method"] not in METHODS:
        raise ValueError(f"method {asked['method']!r}: must be one of {', '.join(METHODS)}")
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in qkv)
    given = () if branch_bias is None else (branch_bias.to(q),)
    return METHODS[asked["method"]](q, k, v, rotate, asked, *given).to(qkv[0].dtype)


def rotation(rope: Mapping[str, Any], width: int, context: int, seqlen: int) -> Rotate:
    """Rotary embedding (arXiv:2104.09864) of heads `width` wide, for a text of `seqlen` tokens.

    rope: "rope_type", "rope_theta" and the type's own keys, as transformers has them. context: the
    model's max_position_embeddings.
    """
    theta, factor = frequencies(rope, width, context, seqlen)

    def rotate(x: Tensor, positions: Tensor | None = None) -> Tensor:
        positions = torch.arange(x.shape[1]) if positions is None else positions
        angles = positions.double()[:, None, None] * theta  # [s, 1, d / 2]
        cos, sin = ((y * factor).to(x) for y in (angles.cos(), angles.sin()))
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    return rotate


def frequencies(
    rope: Mapping[str, Any], width: int, context: int, seqlen: int
) -> tuple[Tensor, float]:
    """(radians a token, float64 `[width / 2]`; what cos and sin are multiplied by)."""
    kind = rope.get("rope_type", "default")
    base, factor = float(rope["rope_theta"]), rope.get("factor") or 1.0
    original = rope.get("original_max_position_embeddings") or context
    if kind == "dynamic" and seqlen > context:
        base *= (factor * seqlen / context - (factor - 1)) ** (width / (width - 2))
    theta = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    if kind == "linear":
        return theta / factor, 1.0
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((original * theta / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return theta / factor * (1 - kept) + theta * kept, 1.0
    if kind == "yarn":
        low, high = (
            width * math.log(original / (rope[key] * 2 * math.pi)) / (2 * math.log(base))
            for key in ("beta_fast", "beta_slow")
        )
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high += 0.001 if low == high else 0
        ramp = ((torch.arange(width // 2).double() - low) / (high - low)).clamp(0, 1)
        return theta * (1 - ramp) + theta / factor * ramp, rope["attention_factor"]
    if kind == "longrope":
        divisors = rope["long_factor" if seqlen > original else "short_factor"]
        return theta / torch.tensor(divisors, dtype=torch.float64), rope["attention_factor"]
    if kind not in ("default", "dynamic"):
        raise ValueError(f"rope_type {kind!r} is not known to this model")
    return theta, 1.0


def _full(q: Tensor, k: Tensor, v: Tensor, rotate: Rotate, asked: Mapping[str, Any]) -> Tensor:
    """softmax of scaled products over keys that are not later."""
    return _softmax(rotate(q), rotate(k), v)


def _coca(q: Tensor, t: Tensor, v: Tensor, rotate: Rotate, asked: Mapping[str, Any]) -> Tensor:
    """CoCA (arXiv:2309.08646): keys collinear with queries, tau = relu(mean of t's two halves).

    slack: (q * R q) . R [tau ; tau]; strict: R [|q|^2 ; 0] . R [tau ; 0], pair by pair.
    """
    tau = (0.5 * (t[..., : t.shape[-1] // 2] + t[..., t.shape[-1] // 2 :])).relu()
    if asked["variant"] == "slack":
        return _softmax(q * rotate(q), rotate(torch.cat((tau, tau), -1)), v)
    a, b = q.chunk(2, -1)
    square = a.square() + b.square()
    queries, keys = (torch.cat((x, torch.zeros_like(x)), -1) for x in (square, tau))
    return _softmax(rotate(queries), rotate(keys), v)


def _lssar(q: Tensor, k: Tensor, v: Tensor, rotate: Rotate, asked: Mapping[str, Any]) -> Tensor:
    """Length-scaled softplus attention (arXiv:2501.13428), re-weighted or not.

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
        if asked["reweight"]:
            share = (counts.double().reciprocal() * (counts > asked["exempt_rows"])).to(q)
            mean, top = f.sum(-1, keepdim=True) * share, f.amax(-1, keepdim=True)
            spread = (top - mean).detach()
            # A row of equal scores has nothing above its mean but rounding.
            flat = spread <= 64 * torch.finfo(f.dtype).eps * top
            f = (f - mean).relu() / spread.masked_fill(flat, torch.inf)
            none = f == 0
            f = f.masked_fill(none, 1.0).pow(asked["power"]).masked_fill(none, 0.0)
        total = f.sum(-1, keepdim=True)
        out.append(_mix(f / total.masked_fill(total == 0, 1.0), v[:, :stop]))
    return torch.cat(out, 1)


def _landmark(q: Tensor, k: Tensor, v: Tensor, rotate: Rotate, asked: Mapping[str, Any]) -> Tensor:
    """Landmark attention (arXiv:2305.16300): the last token of every block is its landmark.

    A query sees its own block but for the landmark, and each past block through one gate, the
    landmark's logit; inside a past block a softmax of its own shares out what the gate lets in.
    """
    size, seqlen = asked["block_size"], q.shape[1]
    blocks = -(-seqlen // size)
    q, k, scale = rotate(q), rotate(k), q.shape[3] ** -0.5
    room = (0, 0, 0, 0, 0, blocks * size - seqlen)
    k, v = torch.nn.functional.pad(k, room), torch.nn.functional.pad(v, room)
    index, out = torch.arange(blocks * size, device=q.device), []
    unit = asked["select_tokens"] if asked["top_k"] is not None else seqlen
    # Whole units, of which a long one is read in several steps.
    for first, last in _spans(q, blocks * size, unit):
        read = None if asked["top_k"] is None else _chosen(q, k, asked, (first, last))
        for start, stop in _spans(q[:, first:last], blocks * size):
            rows = torch.arange(first + start, first + stop, device=q.device)[:, None]
            seen = -(-(first + stop) // size)  # blocks that one of these rows may look at
            keys, values = k[:, : seen * size], v[:, : seen * size]
            scores = _scores(q[:, first + start : first + stop] * scale, keys)
            scores = scores.unflatten(-1, (seen, size))
            slots = index[: seen * size]
            local = (slots // size == rows // size) & (slots <= rows) & (slots % size != size - 1)
            past = index[:seen] < rows // size
            if read is not None:
                of_row = read[:, :, rows[:, 0] // unit - first // unit, :seen]
                past = past & of_row.repeat_interleave(q.shape[2] // k.shape[2], 1)
            gates = scores[..., -1].masked_fill(~past, -torch.inf)
            plain = scores.flatten(-2).masked_fill(~local, -torch.inf)
            weights = torch.cat((gates, plain), -1).softmax(-1)
            inside = scores[..., :-1].softmax(-1)
            inside = torch.cat((inside, torch.zeros_like(inside[..., :1])), -1)
            blockwise = (weights[..., :seen, None] * inside).flatten(-2)
            out.append(_mix(blockwise + weights[..., seen:], values))
    return torch.cat(out, 1)


@torch.no_grad()
def _chosen(q: Tensor, k: Tensor, asked: Mapping[str, Any], span: tuple[int, int]) -> Tensor:
    """Which past blocks the selection units in `span` read, bool `[b, h_kv, units, blocks]`.

    For a key head, those of greatest probability among past landmarks, the greatest over the
    unit's rows and the head's queries; of equal ones, equal in float32, those that come first.
    """
    size, unit = asked["block_size"], asked["select_tokens"]
    marks = k[:, size - 1 :: size].double() * q.shape[3] ** -0.5
    number, count = torch.arange(marks.shape[1], device=q.device), -((span[0] - span[1]) // unit)
    cost = q.new_full((len(q), k.shape[2], count, len(number)), torch.inf, dtype=torch.float32)
    for start, stop in _spans(q[:, span[0] : span[1]], len(number)):
        rows = torch.arange(span[0] + start, span[0] + stop, device=q.device)
        hidden = number >= rows[:, None] // size
        scores = _scores(q[:, span[0] + start : span[0] + stop].double(), marks)
        scores = scores.masked_fill(hidden, -torch.inf)
        one = (1 - (scores - scores.logsumexp(-1, keepdim=True))).masked_fill(hidden, torch.inf)
        one = one.unflatten(1, (k.shape[2], -1)).amin(2).float()
        units = ((rows - span[0]) // unit)[:, None].expand_as(one)
        cost.scatter_reduce_(2, units, one, "amin")
    best = cost.sort(dim=-1, stable=True).indices[..., : asked["top_k"]]
    return torch.zeros_like(cost, dtype=torch.bool).scatter(-1, best, True)


def _tensorized(
    q: Tensor, k: Tensor, v: Tensor, rotate: Rotate, asked: Mapping[str, Any], *bias: Tensor
) -> Tensor:
    """Tensorized attention, lexicographic (after arXiv:2410.20926): one softmax over all branches.

    A position is written in digits, finest first; a fibre of a mode is the tokens that differ in
    its digit alone. U_j = softmax(S_j | fibre of mode j) U_{j-1}, U_0 = v; a query's branch j reads
    U_{j-1} at the keys of its fibre whose digit is smaller by local_blocks at least, and branch 0
    its own block and those just before. branch_bias is added to the coarse branches.
    """
    fold, group = _Fold(asked, q.shape[1]), q.shape[2] // k.shape[2]
    by_key_head = asked["hop_heads"] == "kv" or (asked["hop_heads"] == "auto" and group > 2)
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
    """A text folded into modes, finest first; the coarsest, number `last`, grows with it."""

    def __init__(self, asked: Mapping[str, Any], seqlen: int) -> None:
        self.modes, self.pe = asked["modes"], asked["pe"]
        self.last, self.place = len(self.modes), torch.arange(seqlen)
        self.near = asked["local_blocks"] if self.modes else 1

    def digit(self, mode: int) -> Tensor:
        digit = self.place // math.prod(self.modes[:mode])
        return digit % self.modes[mode] if mode < self.last else digit

    def angle(self, mode: int) -> Tensor:
        whole = self.pe == "global" or (mode == 0 and self.near > 1)
        return self.place if whole else self.digit(mode)

    def fibre(self, mode: int, start: int, stop: int) -> Tensor:
        """Which tokens share the fibre of rows start to stop, bool `[rows, s]`."""
        stride = math.prod(self.modes[:mode])
        # The other digits, in a number of their own.
        rest = self.place - self.digit(mode) * stride
        return rest[start:stop, None] == rest

    def branch(self, mode: int, start: int, stop: int) -> Tensor:
        """Which tokens these rows read in branch `mode`."""
        if mode:
            digit = self.digit(mode)
            return self.fibre(mode, start, stop) & (digit <= digit[start:stop, None] - self.near)
        block = self.place // (self.modes[0] if self.modes else len(self.place))
        late = self.place > self.place[start:stop, None]
        return ~late & (block > block[start:stop, None] - self.near)


METHODS: dict[str, Callable[..., Tensor]] = {"full": _full, "coca": _coca, "lssar": _lssar}
METHODS |= {"landmark": _landmark, "tensorized": _tensorized}


def _softmax(q: Tensor, k: Tensor, v: Tensor, mask: Callable[..., Tensor] | None = None) -> Tensor:
    """Softmax attention of q and k as they are, causal or where mask(first row, last) is True."""
    out = []
    for start, stop in _spans(q, k.shape[1]):
        index = torch.arange(stop if mask is None else k.shape[1])
        seen = index <= index[start:stop, None] if mask is None else mask(start, stop)
        scores = _scores(q[:, start:stop] * q.shape[3] ** -0.5, k[:, : len(index)])
        scores = scores.masked_fill(~seen.to(q.device), -torch.inf)
        out.append(_mix(scores.softmax(-1), v[:, : len(index)]))
    return torch.cat(out, 1)


def _spans(q: Tensor, keys: int, unit: int = 1) -> Iterator[tuple[int, int]]:
    """Intervals of the rows of q, whole units, with few enough scores against `keys` keys."""
    step = max(1, SCORES_AT_ONCE // (q.shape[0] * q.shape[2] * max(1, keys)) // unit) * unit
    for start in range(0, q.shape[1], step):
        yield start, min(start + step, q.shape[1])


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q . k, `[b, h, s, t]`; every key head serves its group of neighbouring query heads."""
    q = q.unflatten(2, (k.shape[2], -1))
    return torch.einsum("bskgd,btkd->bkgst", q, k).flatten(1, 2)


def _mix(weights: Tensor, v: Tensor) -> Tensor:
    """Weights `[b, h, s, t]` times values, `[b, s, h, d]`."""
    weights = weights.unflatten(1, (v.shape[2], -1))
    return torch.einsum("bkgst,btkd->bskgd", weights, v).flatten(2, 3)
