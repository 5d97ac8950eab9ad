"""Length-scaled softmax: scores grow with the logarithm of the tokens that a query sees."""

import math

from torch import Tensor

from lcdist_kernels.common import wide_dtype


def scaled_queries(q: Tensor, positions: Tensor, length: int) -> Tensor:
    """Return q times ln(n) / ln(length), where each query sees n tokens (arXiv:2202.12172).

    A query that sees one token has a factor of 0, and its softmax is 1 all the same.

    Args:
        q: queries `[b, s, h, d]`, rotated or not; differentiable.
        positions: n - 1, integers `[s]` or `[b, s]` on the device of q.
        length: n of the factor 1.
    """
    factors = (positions + 1).double().log() / math.log(length)
    return (q * factors[..., None, None].to(wide_dtype(q.dtype))).to(q.dtype)
