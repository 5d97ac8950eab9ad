"""Tensors as rows of features, for operators that treat every token alike."""

from torch import Tensor

from lcdist_kernels.step_kernels import resolved
from lcdist_kernels.triton_common import unsupported_tensor_reason

ROW_IMPLS = ("auto", "triton", "torch")


def as_rows(x: Tensor) -> Tensor:
    """Return x `[.., n]` as `[rows, n]`: contiguous rows that do not overlap.

    A view where x has such rows at one distance, else a copy.
    """
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] else rows.contiguous()


def use_row_kernels(impl: str, x: Tensor) -> bool:
    """Return whether `impl`, "auto", "triton" or "torch", means kernels for tensors like x.

    "auto" takes kernels on CUDA only, unless `step_kernels` says torch: interpreted ones are for
    tests, many times slower than torch.
    Raises ValueError for another word, and for "triton" where kernels do not take such tensors.
    """
    if impl not in ROW_IMPLS:
        raise ValueError(f"impl = {impl!r} is unknown; use one of {', '.join(ROW_IMPLS)}")
    impl, reason = resolved(impl), unsupported_tensor_reason(x)
    if impl == "triton" and reason is not None:
        raise ValueError(f"impl = 'triton': {reason}; use impl = 'auto' or 'torch'")
    return impl == "triton" or (impl == "auto" and x.is_cuda and reason is None)
