"""What carries softmax attention over a block: tiled torch or the kernels, chosen once by name."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lcdist_kernels.common import log_choice
from lcdist_kernels.full import kernel, tiled
from lcdist_kernels.triton_common import check_kernel, unsupported_reason


class AttentionImpl(NamedTuple):
    """`full_fwd` and `full_bwd`, of one semantics, as `tiled` describes them."""

    fwd: Callable[..., tuple[Tensor, Tensor]]
    bwd: Callable[..., tuple[Tensor, Tensor, Tensor]]


TORCH_IMPL = AttentionImpl(tiled.full_fwd, tiled.full_bwd)
TRITON_IMPL = AttentionImpl(kernel.full_fwd, kernel.full_bwd)


def select_impl(impl: str, x: Tensor, what: str) -> AttentionImpl:
    """The operator that `impl`, "auto", "triton" or "torch", stands for with tensors like x.

    x `[b, s, h, d]`; what: who asks, for the log. Raises ValueError for "triton" where no kernel
    takes such tensors.
    """
    if impl == "triton":
        check_kernel(x)
        return TRITON_IMPL
    if impl == "torch":
        return TORCH_IMPL
    # Interpreted kernels are for tests: many times slower than torch.
    reason = (
        unsupported_reason(x)
        if x.is_cuda
        else f"kernels run on CUDA, the tensors are on {x.device}"
    )
    if reason is None:
        log_choice(f"{what}: Triton kernels, as the tensors are {x.dtype} on CUDA")
        return TRITON_IMPL
    log_choice(f"{what}: tiled torch, as {reason}")
    return TORCH_IMPL
