"""Statistics and gradient of cross-entropy over a shard of the vocabulary, from its logits.

Logits stay in their own dtype: each function reads them once, and `grad_` writes the gradient over
them. Statistics are fp32 or wider. The formulas are in `reference.py`. Neither is differentiable:
`grad_` is the backward of lse - picked, with lse over all shards.
"""

from torch import Tensor

from lcdist_kernels.common import wide_dtype
from lcdist_kernels.step_kernels import resolved
from lcdist_kernels.triton_common import DTYPES
from lcdist_kernels.vocab_loss import kernel, tiled

IMPLS = ("auto", "triton", "torch")


def stats(
    logits: Tensor, targets: Tensor, first: int, real: int, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return each token's log-sum-exp over the shard, and its target's logit.

    Args:
        logits: `[t, columns]`; what is in padding columns has no effect, even NaN.
        targets: int64 `[t]`, of the whole vocabulary.
        first: the token of the first column.
        real: columns that stand for a token; padding follows them.
        impl: "auto" is the kernel on CUDA below float64, elsewhere torch.

    Returns:
        lse: `[t]`, fp32 or wider; -inf for a shard of padding alone.
        picked: `[t]`, like lse; 0 where another shard has the target.
    """
    _check(logits, targets, real)
    maker = kernel if _by_kernel(impl, logits) else tiled
    return maker.stats(logits, targets.contiguous(), first, real)


def grad_(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    dout: Tensor,
    first: int,
    real: int,
    impl: str = "auto",
) -> Tensor:
    """Overwrite the logits with the gradient of the loss, 0 in padding columns; return them.

    Args:
        logits, targets, first, real, impl: as of `stats`.
        lse: over all shards, `[t]`, fp32 or wider.
        dout: the gradient of each token's loss, like lse.
    """
    _check(logits, targets, real)
    wide = wide_dtype(logits.dtype)
    if not lse.shape == dout.shape == targets.shape or not lse.dtype == dout.dtype == wide:
        raise ValueError(
            f"lse {tuple(lse.shape)}, {lse.dtype}, dout {tuple(dout.shape)}, {dout.dtype}: "
            f"expected {wide} of shape {tuple(targets.shape)}"
        )
    maker = kernel if _by_kernel(impl, logits) else tiled
    targets, lse, dout = (x.contiguous() for x in (targets, lse, dout))
    maker.grad_(logits, targets, lse, dout, first, real)
    return logits


def _by_kernel(impl: str, logits: Tensor) -> bool:
    if impl not in IMPLS:
        raise ValueError(f"impl = {impl!r} is unknown: use one of {', '.join(IMPLS)}")
    impl, takes = resolved(impl), logits.dtype in DTYPES
    if impl == "triton" and not takes:
        raise ValueError(f"impl = 'triton': kernels take bf16, fp16 and fp32, not {logits.dtype}")
    return impl == "triton" or (impl == "auto" and takes and logits.is_cuda)


def _check(logits: Tensor, targets: Tensor, real: int) -> None:
    """Raise ValueError unless logits `[t, columns]` and targets `[t]` fit each other."""
    fits = logits.dim() == 2 and targets.shape == logits.shape[:1] and logits.stride(1) == 1
    if not fits or not 0 <= real <= logits.shape[1]:
        raise ValueError(
            f"logits {tuple(logits.shape)} with strides {logits.stride()}, targets "
            f"{tuple(targets.shape)}, real = {real}: expected rows [t, columns], [t] and at most "
            "as many real columns as there are"
        )
