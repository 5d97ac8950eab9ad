"""The loss rule, written once: a sum over tokens, divided once by their number over all ranks.

Never a mean on a rank: ranks with more padding would weigh as much as full ones.
"""

import torch
from torch import Tensor


def loss_sum(losses: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's part of the loss: losses and mask `[b, s_local]`, in nats.

    Returns Megatron's triple (sum to differentiate, number of tokens int32, [sum, number] fp64 for
    the log). Megatron sums gradients over ranks and divides by the global number of tokens.
    """
    total = (losses.float() * loss_mask).sum()
    count = loss_mask.sum()
    log = torch.stack([total.detach(), count]).double()
    return total, count.to(torch.int32), log
