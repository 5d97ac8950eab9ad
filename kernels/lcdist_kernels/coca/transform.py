"""CoCA as q'.k': the elementwise maps to q' and k' with their adjoints (arXiv:2309.08646).

With half = head_dim / 2, a = q[l], b = q[l + half], and c, s the cosine and sine of a token's angle
for pair l, on the key side tau[l] = relu((t[l] + t[l + half]) / 2) and

    slack    q' = [a (a c - b s) ; b (b c + a s)]        k' = [tau (c - s) ; tau (c + s)]
    strict   q' = [(a^2 + b^2) c ; (a^2 + b^2) s]        k' = [tau c ; tau s]

q'.k' is the paper's score: eq. 10 for slack (queries unconstrained, as in the authors' program),
eq. 17 for strict. So any softmax attention computes it, and tau alone determines a key. As q' is
quadratic in q, products are in the wider of fp32 and the input's dtype.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lcdist_kernels.common import wide_dtype
from lcdist_kernels.rotary import Rotary

VARIANTS = ("slack", "strict")


class Angles(NamedTuple):
    """Cosine and sine of each token and pair, `[1 or b, s, 1, head_dim / 2]`, in a wide dtype."""

    cos: Tensor
    sin: Tensor


def check_variant(variant: str, head_dim: int) -> None:
    """Raise ValueError unless `variant` is known and head_dim is even."""
    if variant not in VARIANTS:
        raise ValueError(f"variant = {variant!r}: must be one of {', '.join(VARIANTS)}")
    if head_dim % 2:
        raise ValueError(f"head_dim = {head_dim}: CoCA pairs features, so head_dim must be even")


@torch.no_grad()
def rotary_angles(rotary: Rotary | None, positions: Tensor, like: Tensor, head_dim: int) -> Angles:
    """Return the angles of tokens at `positions`, integers `[s]` or `[b, s]`.

    rotary: None means no rotation. like: gives the device and, widened, the dtype. Raises
    ValueError where the rotary covers another head_dim, as each pair must have one frequency.
    """
    half = head_dim // 2
    table = positions if positions.dim() == 2 else positions[None]
    unit = torch.zeros(*table.shape, 1, head_dim, dtype=wide_dtype(like.dtype), device=like.device)
    unit[..., :half].fill_(1.0)
    # (1, 0) rotated by an angle is (cosine, sine), attention factor included.
    rotated = unit if rotary is None else rotary.rotate(unit, positions)
    return Angles(rotated[..., :half], rotated[..., half:])


def queries(q: Tensor, angles: Angles, variant: str) -> Tensor:
    """Return q' of q `[b, s, h, d]`, shaped like q, in the wider of fp32 and q.dtype."""
    a, b = q.to(angles.cos.dtype).chunk(2, -1)
    out = torch.empty(q.shape, dtype=angles.cos.dtype, device=q.device)
    first, second = out.chunk(2, -1)
    if variant == "strict":
        square = (a * a).addcmul_(b, b)
        torch.mul(square, angles.cos, out=first)
        torch.mul(square, angles.sin, out=second)
    else:
        torch.mul(a, angles.cos, out=first).addcmul_(b, angles.sin, value=-1).mul_(a)
        torch.mul(b, angles.cos, out=second).addcmul_(a, angles.sin).mul_(b)
    return out


def queries_bwd(dqueries: Tensor, q: Tensor, angles: Angles, variant: str) -> Tensor:
    """Return the gradient of q `[b, s, h, d]` from that of q', in the wide dtype."""
    a, b = q.to(angles.cos.dtype).chunk(2, -1)
    first, second = dqueries.to(angles.cos.dtype).chunk(2, -1)
    dq = torch.empty(q.shape, dtype=angles.cos.dtype, device=q.device)
    da, db = dq.chunk(2, -1)
    if variant == "strict":
        dsquare = (first * angles.cos).addcmul_(second, angles.sin).mul_(2)
        torch.mul(a, dsquare, out=da)
        torch.mul(b, dsquare, out=db)
    else:
        # The product a b is in both halves, with opposite signs.
        across = (second - first).mul_(angles.sin)
        torch.mul(first, a, out=da).mul_(angles.cos).mul_(2).addcmul_(across, b)
        torch.mul(second, b, out=db).mul_(angles.cos).mul_(2).addcmul_(across, a)
    return dq


def factors(q: Tensor, t: Tensor, angles: Angles, variant: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return q', k' in a wide dtype, and tau, of q `[b, s, h, d]` and t `[b, s, h_kv, d]`."""
    tau = collinear(t)
    return *factors_of_tau(q, tau, angles, variant), tau


def factors_of_tau(q: Tensor, tau: Tensor, angles: Angles, variant: str) -> tuple[Tensor, Tensor]:
    """Return q' and k' of q `[b, s, h, d]` and tau `[b, s, h_kv, d / 2]`, in a wide dtype."""
    return queries(q, angles, variant), keys(tau, angles, variant)


def factors_bwd(
    dqueries: Tensor, dkeys: Tensor, q: Tensor, tau: Tensor, angles: Angles, variant: str
) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and t from those of q' and k', in q.dtype."""
    dq = queries_bwd(dqueries, q, angles, variant)
    dt = collinear_bwd(keys_bwd(dkeys, angles, variant), tau)
    return dq.to(q.dtype), dt.to(q.dtype)


def collinear(t: Tensor) -> Tensor:
    """Return tau `[..., d / 2]` of t `[..., d]`, in t.dtype: average the halves, then relu."""
    first, second = t.chunk(2, -1)
    return first.add(second).mul_(0.5).relu_()


def collinear_bwd(dtau: Tensor, tau: Tensor) -> Tensor:
    """Return the gradient of t `[..., d]` from that of tau; zero where tau is zero."""
    half = dtau.masked_fill(tau <= 0, 0.0).mul_(0.5)
    return torch.cat((half, half), -1)


def keys(tau: Tensor, angles: Angles, variant: str) -> Tensor:
    """Return k' `[b, s, h, d]` of tau `[b, s, h, d / 2]`, in the wider of fp32 and tau.dtype."""
    first, second = _key_factors(angles, variant)
    tau = tau.to(angles.cos.dtype)
    return torch.cat((tau * first, tau * second), -1)


def keys_bwd(dkeys: Tensor, angles: Angles, variant: str) -> Tensor:
    """Return the gradient of tau `[b, s, h, d / 2]` from that of k', in the wide dtype."""
    first, second = _key_factors(angles, variant)
    dfirst, dsecond = dkeys.to(angles.cos.dtype).chunk(2, -1)
    return (dfirst * first).addcmul_(dsecond, second)


def _key_factors(angles: Angles, variant: str) -> tuple[Tensor, Tensor]:
    """Return the factors of tau in the two halves of k'."""
    if variant == "strict":
        return angles.cos, angles.sin
    return angles.cos - angles.sin, angles.cos + angles.sin
