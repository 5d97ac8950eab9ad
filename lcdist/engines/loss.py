"""Loss reduction: sum over the tokens of all ranks, divided once by their number.

A mean per rank would give the tokens of ranks with much padding a larger weight.
"""

import torch
from torch import Tensor


def loss_sum(losses: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return this rank's part of the loss as Megatron expects it.

    Megatron sums gradients over ranks and divides them by the global number of tokens.

    Args:
        losses: nats, `[b, s_local]`.
        loss_mask: 1 for tokens that count, `[b, s_local]`.

    Returns:
        The sum to differentiate, the number of tokens as int32, and [sum, number] in fp64 to log.
    """
    total = (losses.float() * loss_mask).sum()
    num_tokens = loss_mask.sum()
    log_entry = torch.stack([total.detach(), num_tokens]).double()
    return total, num_tokens.to(torch.int32), log_entry
