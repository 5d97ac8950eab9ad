"""Dense cross-entropy over a shard of the vocabulary, in float64, to compare others with.

Token t has the target y_t. A shard holds the columns of the tokens first <= v < first + real:

    lse_t = log sum_v exp(x_tv)        picked_t = x_(t, y_t), or 0 where the shard lacks y_t
    dx_tv = (exp(x_tv - lse_t) - [v = y_t]) dout_t
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def stats_reference(
    logits: Tensor, targets: Tensor, first: int, real: int
) -> tuple[Tensor, Tensor]:
    """Return lse and picked logits, float64 `[t]`; arguments as of `stats`."""
    x = logits[:, :real].double()
    return torch.logsumexp(x, 1), (x * _one_hot(targets, first, real)).sum(1)


def grad_reference(
    logits: Tensor, targets: Tensor, lse: Tensor, dout: Tensor, first: int, real: int
) -> Tensor:
    """Return the gradient of the logits, float64 `[t, columns]`; arguments as of `grad_`."""
    x = logits[:, :real].double()
    dx = torch.exp(x - lse.double()[:, None]) - _one_hot(targets, first, real)
    return F.pad(dx * dout.double()[:, None], (0, logits.shape[1] - real))


def _one_hot(targets: Tensor, first: int, real: int) -> Tensor:
    """Return 1 in the column of each token's target, float64 `[t, real]`."""
    columns = torch.arange(first, first + real, device=targets.device)
    return (targets[:, None] == columns).double()
