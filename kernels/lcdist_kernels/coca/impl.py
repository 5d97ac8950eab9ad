"""What carries CoCA: its elementwise maps and the softmax over a block, chosen once by name."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lcdist_kernels import full
from lcdist_kernels.coca import transform, transform_kernel


class CoCAImpl(NamedTuple):
    """Full attention's operator over q' and k', and what makes those, as in `transform`.

    The kernels' maps give q' and k' in the input's dtype, rounded once, as their softmax takes
    them; torch's in a wide one.
    """

    block: full.AttentionImpl
    queries: Callable[..., Tensor]
    queries_bwd: Callable[..., Tensor]
    keys: Callable[..., Tensor]
    keys_bwd: Callable[..., Tensor]


TORCH_IMPL = CoCAImpl(
    full.TORCH_IMPL, transform.queries, transform.queries_bwd, transform.keys, transform.keys_bwd
)
TRITON_IMPL = CoCAImpl(
    full.TRITON_IMPL,
    transform_kernel.queries,
    transform_kernel.queries_bwd,
    transform_kernel.keys,
    transform_kernel.keys_bwd,
)


def select_coca_impl(impl: str, x: Tensor, what: str) -> CoCAImpl:
    """The operator that `impl`, "auto", "triton" or "torch", stands for with tensors like x.

    x `[b, s, h, d]`; what: who asks, for the log. Raises ValueError for "triton" where no kernel
    takes such tensors.
    """
    return TRITON_IMPL if full.select_impl(impl, x, what) is full.TRITON_IMPL else TORCH_IMPL
