"""Cross-entropy over shards of the vocabulary: kernels and torch against the dense reference."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lcdist_kernels import vocab_loss
from lcdist_kernels.vocab_loss import kernel, tiled
from tests.kernels.helpers import HERE
from tests.kernels.tiers import covering, one
from tests.tolerance import assert_matches

FP32 = 1e-6


class Shard(NamedTuple):
    """Logits of `tokens`, of which the columns of the tokens first to first + real are a part."""

    tokens: int
    columns: int
    first: int
    real: int


SHARDS = [
    Shard(1, 1, 0, 1),
    Shard(7, 131, 0, 131),
    # Padding, then a shard in the middle, then one of padding alone.
    Shard(5, 64, 100, 37),
    Shard(9, 48, 60, 48),
    Shard(3, 16, 200, 0),
]


def problem(shard: Shard, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return logits as a view into NaN with NaN in padding, targets, lse and dout."""
    generator = torch.Generator().manual_seed(3)
    x = 4 * torch.randn(shard.tokens, shard.columns, generator=generator)
    x[:, shard.real :] = torch.nan
    home = torch.full((shard.tokens + 2, shard.columns + 5), torch.nan, dtype=dtype, device=HERE)
    logits = home[1:-1, 2:-3].copy_(x)
    # All ranks' targets, one of them this shard's last column.
    targets = torch.randint(shard.first + shard.columns, (shard.tokens,), generator=generator)
    targets[-1] = max(0, shard.first + shard.real - 1)
    wide = torch.promote_types(dtype, torch.float32)
    lse, dout = (torch.randn(shard.tokens, generator=generator).to(HERE, wide) for _ in range(2))
    return logits, targets.to(HERE), lse + 5, dout * (dout.abs() > 0.3)


CASES = [
    ("triton", torch.float32),
    ("triton", torch.float16),
    ("triton", torch.bfloat16),
    ("torch", torch.float64),
    ("torch", torch.bfloat16),
]


@pytest.mark.parametrize(("impl", "dtype", "shard"), covering(CASES, one(SHARDS), free=2))
def test_equals_the_reference(
    impl: str, dtype: torch.dtype, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "BLOCK", 32)
    monkeypatch.setattr(tiled, "BLOCK_ELEMENTS", 300)
    logits, targets, lse, dout = problem(shard, dtype)
    home, around = logits._base, logits.clone()
    assert home is not None
    of_shard = shard.first, shard.real
    tolerance = 1e-12 if dtype == torch.float64 else FP32
    lse_here, picked = vocab_loss.stats(logits, targets, *of_shard, impl)
    truth = vocab_loss.stats_reference(logits, targets, *of_shard)
    assert lse_here.dtype == picked.dtype == lse.dtype
    if shard.real:
        assert_matches(lse_here, truth[0], tolerance)
    else:
        assert (lse_here == -torch.inf).all()
    assert_matches(picked, truth[1], tolerance)
    assert torch.equal(logits.nan_to_num(), around.nan_to_num())
    truth_dx = vocab_loss.grad_reference(logits, targets, lse, dout, *of_shard)
    dx = vocab_loss.grad_(logits, targets, lse, dout, *of_shard, impl)
    assert dx is logits and not dx[:, shard.real :].count_nonzero()
    assert_matches(dx, truth_dx, max(tolerance, torch.finfo(dtype).eps))
    home[1:-1, 2:-3] = torch.nan
    assert home.isnan().all(), "something outside was written"


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_shards_together_are_torchs_cross_entropy(impl: str) -> None:
    logits = 30 * torch.randn(11, 70, device=HERE)
    targets = torch.randint(61, (11,), device=HERE)
    dout = torch.randn(11, device=HERE)
    leaf = logits[:, :61].double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(leaf, targets, reduction="none")
    [truth] = torch.autograd.grad(losses, leaf, dout.double())
    shards = [(logits[:, :40].contiguous(), 0, 40), (logits[:, 40:].contiguous(), 40, 21)]
    terms = [vocab_loss.stats(x, targets, *of_shard, impl) for x, *of_shard in shards]
    lse = torch.logaddexp(terms[0][0], terms[1][0])
    assert_matches(lse - terms[0][1] - terms[1][1], losses, FP32)
    parts = [vocab_loss.grad_(x, targets, lse, dout, *at, impl) for x, *at in shards]
    assert_matches(torch.cat(parts, 1)[:, :61], truth, FP32)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_what_is_not_finite_shows(impl: str) -> None:
    logits = torch.zeros(3, 20, device=HERE)
    logits[0, 3], logits[1, 3], logits[2, :] = torch.nan, -torch.inf, -1e30
    targets = torch.zeros(3, dtype=torch.int64, device=HERE)
    lse, _ = vocab_loss.stats(logits, targets, 0, 20, impl)
    assert lse[0].isnan() and lse[1:].isfinite().all()
    dout = torch.ones(3, device=HERE)
    dx = vocab_loss.grad_(logits, targets, lse, dout, 0, 20, impl)
    assert dx[0].isnan().any() and dx[1:].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    logits, rows = torch.zeros(3, 8), torch.zeros(3)
    targets = torch.zeros(3, dtype=torch.int64)
    for wrong in (targets[:2], targets[None]):
        with pytest.raises(ValueError, match="expected rows"):
            vocab_loss.stats(logits, wrong, 0, 8)
    with pytest.raises(ValueError, match="at most"):
        vocab_loss.stats(logits, targets, 0, 9)
    with pytest.raises(ValueError, match=r"expected torch\.float32 of shape"):
        vocab_loss.grad_(logits, targets, rows, rows.double(), 0, 8)
    with pytest.raises(ValueError, match="kernels take bf16, fp16 and fp32"):
        vocab_loss.stats(logits.double(), targets, 0, 8, "triton")
    with pytest.raises(ValueError, match="use one of auto, triton, torch"):
        vocab_loss.stats(logits, targets, 0, 8, "cudnn")
