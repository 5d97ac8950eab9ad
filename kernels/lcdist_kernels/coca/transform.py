"""CoCA as q'.k': the elementwise maps to q' and k', and their adjoints by hand (arXiv:2309.08646).

With half = head_dim / 2, a = q[l], b = q[l + half], and c, s the cosine and sine of a token's angle
for pair l, on the key side tau[l] = relu((t[l] + t[l + half]) / 2) and

    slack    q' = [a (a c - b s) ; b (b c + a s)]        k' = [tau (c - s) ; tau (c + s)]
    strict   q' = [(a^2 + b^2) c ; (a^2 + b^2) s]        k' = [tau c ; tau s]

q'.k' is the paper's score: eq. 10 for slack (queries not constrained, as in the authors' program),
eq. 17 for strict. So any softmax attention computes it, and a key is known by its tau alone.
Products are taken in the wider of fp32 and the input's dtype, since q' is quadratic in q.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lcdist_kernels.common import wide_dtype
from lcdist_kernels.rotary import Rotary

VARIANTS = ("slack", "strict")


class Angles(NamedTuple):
    """cos and sin of every token and pair, `[1 or b, s, 1, head_dim / 2]`, in a wide dtype."""

    cos: Tensor
    sin: Tensor


def check_variant(variant: str, head_dim: int) -> None:
    """Raises ValueError unless `variant` is known and head_dim can be split into pairs."""
    if variant not in VARIANTS:
        raise ValueError(f"variant = {variant!r}: must be one of {', '.join(VARIANTS)}")
    if head_dim % 2:
        raise ValueError(f"head_dim = {head_dim}: CoCA pairs features, so it must be even")


@torch.no_grad()
def rotary_angles(rotary: Rotary | None, positions: Tensor, like: Tensor, head_dim: int) -> Angles:
    """The angles of tokens at `positions`, integers `[s]` or `[b, s]`.

    like: gives device and dtype, widened. rotary None: no rotation. Raises ValueError where the
    rotary turns another number of features than head_dim: every pair must share one frequency.
    """
    half = head_dim // 2
    rows = positions if positions.dim() == 2 else positions[None]
    unit = torch.zeros(*rows.shape, 1, head_dim, dtype=wide_dtype(like.dtype), device=like.device)
    unit[..., :half] = 1.0
    # (1, 0) turned by an angle is its cosine and sine, attention factor included.
    turned = unit if rotary is None else rotary.rotate(unit, positions)
    return Angles(turned[..., :half], turned[..., half:])


def queries(q: Tensor, at: Angles, variant: str) -> Tensor:
    """q' of q `[b, s, h, d]`, of q's shape, in the wider of fp32 and q.dtype."""
    a, b = q.to(at.cos.dtype).chunk(2, -1)
    out = torch.empty(q.shape, dtype=at.cos.dtype, device=q.device)
    first, second = out.chunk(2, -1)
    if variant == "strict":
        square = (a * a).addcmul_(b, b)
        torch.mul(square, at.cos, out=first)
        torch.mul(square, at.sin, out=second)
    else:
        torch.mul(a, at.cos, out=first).addcmul_(b, at.sin, value=-1).mul_(a)
        torch.mul(b, at.cos, out=second).addcmul_(a, at.sin).mul_(b)
    return out


def queries_bwd(dqueries: Tensor, q: Tensor, at: Angles, variant: str) -> Tensor:
    """The gradient of q `[b, s, h, d]` from that of q', in the wide dtype."""
    a, b = q.to(at.cos.dtype).chunk(2, -1)
    first, second = dqueries.to(at.cos.dtype).chunk(2, -1)
    dq = torch.empty(q.shape, dtype=at.cos.dtype, device=q.device)
    da, db = dq.chunk(2, -1)
    if variant == "strict":
        dsquare = (first * at.cos).addcmul_(second, at.sin).mul_(2)
        torch.mul(a, dsquare, out=da)
        torch.mul(b, dsquare, out=db)
    else:
        # The product of a and b enters both halves, with opposite signs.
        across = (second - first).mul_(at.sin)
        torch.mul(first, a, out=da).mul_(at.cos).mul_(2).addcmul_(across, b)
        torch.mul(second, b, out=db).mul_(at.cos).mul_(2).addcmul_(across, a)
    return dq


def collinear(t: Tensor) -> Tensor:
    """tau `[..., d / 2]` of t `[..., d]`, in t.dtype: halves averaged first, rectified after."""
    first, second = t.chunk(2, -1)
    return first.add(second).mul_(0.5).relu_()


def collinear_bwd(dtau: Tensor, tau: Tensor) -> Tensor:
    """The gradient of t `[..., d]` from that of tau; zero where tau is."""
    half = dtau.masked_fill(tau <= 0, 0.0).mul_(0.5)
    return torch.cat((half, half), -1)


def keys(tau: Tensor, at: Angles, variant: str) -> Tensor:
    """k' `[b, s, h, d]` of tau `[b, s, h, d / 2]`, in the wider of fp32 and tau.dtype."""
    first, second = _key_factors(at, variant)
    tau = tau.to(at.cos.dtype)
    return torch.cat((tau * first, tau * second), -1)


def keys_bwd(dkeys: Tensor, at: Angles, variant: str) -> Tensor:
    """The gradient of tau `[b, s, h, d / 2]` from that of k', in the wide dtype."""
    first, second = _key_factors(at, variant)
    dfirst, dsecond = dkeys.to(at.cos.dtype).chunk(2, -1)
    return (dfirst * first).addcmul_(dsecond, second)


def _key_factors(at: Angles, variant: str) -> tuple[Tensor, Tensor]:
    """What tau is multiplied by in either half of k'."""
    if variant == "strict":
        return at.cos, at.sin
    return at.cos - at.sin, at.cos + at.sin
