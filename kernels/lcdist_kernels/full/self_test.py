"""Compare a library with the tiled operator on small tensors before its results are used.

The queries are the second half of a sequence of odd rows; their keys are a whole block before them
and their own, causal block. So a test covers both kinds of block, a batch that is strided,
fewer key heads than query heads, lse, and gradients by the out and lse of the whole row.
"""

import torch
from torch import Tensor

from lcdist_kernels.full import tiled
from lcdist_kernels.full.library import Library
from lcdist_kernels.partial import merge

BATCH, NHEADS, NHEADS_KV = 2, 4, 2
# Keys of the whole block, and queries: no multiple of a library's tile.
BEFORE, OWN = 136, 200
# A library's lse is summed in fp32 from weights of fp32: a wrong base or a lost factor is far off.
LSE_TOLERANCE = 1e-3
NAMES = ("out", "dq", "dk", "dv")


@torch.no_grad()
def self_test(
    library: Library, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Return what is wrong with a library's results, or None.

    out and gradients may be off by twice what plain torch is off in the same dtype, as measured
    against float64 (the rule of FlashAttention's own tests). Waits for the device once.
    """
    made = torch.Generator().manual_seed(0)
    shapes = [(BATCH, BEFORE + OWN, n, head_dim) for n in (NHEADS, NHEADS_KV, NHEADS_KV, NHEADS)]
    whole = [torch.randn(shape, generator=made).to(device, dtype) for shape in shapes]
    q, dout = (x[:, BEFORE:] for x in (whole[0], whole[3]))
    k, v = whole[1:3]
    scale = head_dim**-0.5
    try:
        got, lse = _by_library(library, q, k, v, dout, scale)
    except Exception as error:
        # Libraries raise classes of their own, those of their compilers among them.
        return f"it raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    truth, true_lse = _by_tiles(q, k, v, dout, scale)
    plain = _by_torch(q, k, v, dout, scale)
    errors = [_relative(lse, true_lse), *map(_relative, got, truth)]
    allowed = [2 * _relative(*pair) + 1e-6 for pair in zip(plain, truth, strict=True)]
    both = torch.stack([*errors, *allowed]).tolist()
    limits = [LSE_TOLERANCE, *both[len(errors) :]]
    for name, error, limit in zip(("lse", *NAMES), both, limits, strict=False):
        # Written so that NaN fails.
        if not error <= limit:
            return f"its {name} is off by {error:.2g}, at most {limit:.2g} is right"
    return None


def _relative(x: Tensor, truth: Tensor) -> Tensor:
    """Return the relative error of x, a number on its device."""
    return (x.double() - truth).norm() / truth.norm()


def _by_library(
    library: Library, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float
) -> tuple[list[Tensor], Tensor]:
    """Return ([out, dq, dk, dv], lse) from a whole and a causal block."""
    blocks = [(slice(0, BEFORE), False), (slice(BEFORE, None), True)]
    parts = [library.fwd(q, k[:, rows], v[:, rows], causal, scale) for rows, causal in blocks]
    merged, lse = merge(*parts[0], *parts[1])
    out = merged.to(q.dtype)
    grads = [
        library.bwd(dout, q, k[:, rows], v[:, rows], out, lse, causal, scale)
        for rows, causal in blocks
    ]
    (dq, dk, dv), (own_dq, own_dk, own_dv) = grads
    dkv = [torch.cat(pair, 1) for pair in ((dk, own_dk), (dv, own_dv))]
    return [out, dq.float() + own_dq.float(), *dkv], lse


def _by_tiles(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float
) -> tuple[list[Tensor], Tensor]:
    """Return the same in float64 by the tiled operator."""
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    k_idx = torch.arange(BEFORE + OWN)
    band = (k_idx[BEFORE:], torch.zeros(OWN, dtype=torch.int64), k_idx)
    out, lse = tiled.full_fwd(q, k, v, *band, scale)
    return [out, *tiled.full_bwd(dout, q, k, v, out, lse, *band, scale)], lse


def _by_torch(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float) -> list[Tensor]:
    """Return [out, dq, dk, dv] by plain torch in q's dtype."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    hidden = torch.ones(OWN, BEFORE + OWN, dtype=torch.bool, device=q.device).triu(BEFORE + 1)
    with torch.enable_grad():
        each = [x.repeat_interleave(NHEADS // NHEADS_KV, 2) for x in (k, v)]
        scores = torch.einsum("bshd,bthd->bhst", q, each[0]) * scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out = torch.einsum("bhst,bthd->bshd", weights, each[1])
        grads = torch.autograd.grad(out, (q, k, v), dout)
    return [out.detach(), *grads]
