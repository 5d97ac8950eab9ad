"""What carries softmax attention over a block: tiled torch or the kernels, chosen once by name."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lcdist_kernels.common import announce
from lcdist_kernels.full import kernel, tiled
from lcdist_kernels.triton_common import check_kernel, obstacle


class BlockOperator(NamedTuple):
    """`full_fwd` and `full_bwd`, of one semantics, as `tiled` describes them."""

    fwd: Callable[..., tuple[Tensor, Tensor]]
    bwd: Callable[..., tuple[Tensor, Tensor, Tensor]]


TILED = BlockOperator(tiled.full_fwd, tiled.full_bwd)
KERNEL = BlockOperator(kernel.full_fwd, kernel.full_bwd)


def block_operator(impl: str, x: Tensor, what: str) -> BlockOperator:
    """The operator that `impl`, "auto", "triton" or "torch", stands for with tensors like x.

    x `[b, s, h, d]`; what: who asks, for the log. Raises ValueError for "triton" where no kernel
    takes such tensors.
    """
    if impl == "triton":
        check_kernel(x)
        return KERNEL
    if impl == "torch":
        return TILED
    # Interpreted kernels are for tests: many times slower than torch.
    reason = obstacle(x) if x.is_cuda else f"kernels run on CUDA, the tensors are on {x.device}"
    if reason is None:
        announce(f"{what}: Triton kernels, as the tensors are {x.dtype} on CUDA")
        return KERNEL
    announce(f"{what}: tiled torch, as {reason}")
    return TILED
