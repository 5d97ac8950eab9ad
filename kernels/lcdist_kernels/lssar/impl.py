"""What carries LSSA and LSSAR: tiled torch or the kernels, chosen once by name."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lcdist_kernels.common import log_choice
from lcdist_kernels.lssar import epilogue, launch, tiled
from lcdist_kernels.lssar.rows import Finished, Reweight
from lcdist_kernels.lssar.tiled import Saved, Sums
from lcdist_kernels.triton_common import check_kernel, unsupported_reason


class LssarImpl(NamedTuple):
    """Operators of one semantics, as `tiled` and `epilogue` describe them.

    narrow: queries and keys are given in the dtype of v, not in the wider of fp32 and it.
    """

    sums: Callable[..., tuple[Tensor, Tensor]]
    fwd: Callable[..., Sums]
    whole: Callable[..., Finished]
    rows: Callable[..., Saved]
    bwd: Callable[..., tuple[Tensor, Tensor, Tensor]]
    narrow: bool

    def factor(self, x: Tensor, v: Tensor) -> Tensor:
        """Directions x in the dtype in which they are multiplied, where values are like v."""
        return x.to(v.dtype) if self.narrow else x


TORCH_IMPL = LssarImpl(
    tiled.lssar_sums,
    tiled.lssar_fwd,
    epilogue.lssar_whole,
    epilogue.lssar_rows,
    tiled.lssar_bwd,
    narrow=False,
)
TRITON_IMPL = LssarImpl(
    launch.lssar_sums,
    launch.lssar_fwd,
    launch.lssar_whole,
    launch.lssar_rows,
    launch.lssar_bwd,
    narrow=True,
)


def select_lssar_impl(
    impl: str, x: Tensor, what: str, reweight: Reweight | None = None
) -> LssarImpl:
    """The operator that `impl`, "auto", "triton" or "torch", stands for with tensors like x.

    x `[b, s, h, d]`; what: who asks, for the log. Raises ValueError for "triton" where no kernel
    takes such tensors, and for a power below 1 in half precision.
    """
    if reweight is not None and reweight.power < 1 and x.element_size() < 4:
        # y^(p - 1) is unbounded at the threshold: directions rounded to half precision give dq, dk
        # off by a tenth at p = 0.5, and it leaves fp16's range at 0.3.
        raise ValueError(
            f"power = {reweight.power:g} with {x.dtype}: below 1 the gradient is unbounded where a "
            "score meets its row's mean, which half precision cannot hold; use a power of at least "
            "1, or float32"
        )
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
