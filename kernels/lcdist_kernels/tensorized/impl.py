"""What carries tensorized attention: tiled torch or the kernels, chosen once by name."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lcdist_kernels.common import log_choice
from lcdist_kernels.tensorized import launch, tiled
from lcdist_kernels.tensorized.tiled import Grads, Partial
from lcdist_kernels.triton_common import check_kernel, unsupported_reason


class TensorizedImpl(NamedTuple):
    """Operators of one semantics, as `tiled` describes them.

    lambda_j is laid out as the operator likes: its own backward takes it back.
    """

    mode_fwd: Callable[..., tuple[Partial, Tensor | None, Tensor | None]]
    mode_bwd: Callable[..., Grads]
    branch_fwd: Callable[..., Partial]
    branch_bwd: Callable[..., Grads]
    hop_fwd: Callable[..., tuple[Tensor, Tensor]]
    hop_bwd: Callable[..., tuple[Tensor, Tensor, Tensor]]
    row_delta: Callable[[Tensor, Tensor], Tensor]


TORCH_IMPL = TensorizedImpl(
    tiled.mode_fwd, tiled.mode_bwd, tiled.branch_fwd, tiled.branch_bwd, tiled.hop_fwd,
    tiled.hop_bwd, tiled.row_delta,
)  # fmt: skip
TRITON_IMPL = TensorizedImpl(
    launch.mode_fwd, launch.mode_bwd, launch.branch_fwd, launch.branch_bwd, launch.hop_fwd,
    launch.hop_bwd, launch.row_delta,
)  # fmt: skip


def select_tensorized_impl(impl: str, x: Tensor, what: str) -> TensorizedImpl:
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
