"""A step of AdamW by torch's fused kernel or apex's, some tensors at a time."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lcdist_kernels.adamw.tensors import Hyper, Tensors, scale_of
from lcdist_kernels.apex import AdamWStep
from lcdist_kernels.apex import adamw as apex_adamw

# Elements whose scaled gradients exist at the same time, or one larger tensor's.
BATCH_ELEMENTS = 2**22


def update(tensors: Tensors, totals: Tensor, hyper: Hyper, by_apex: Any = None) -> None:
    """Update in place, as `op.adamw_` says; by_apex: the extension of `apex.adamw`."""
    scale, is_refused = scale_of(totals, hyper.clip_norm)
    kinds = list(zip(tensors.decays, tensors.lr_ratios, strict=True))
    for decay, lr_ratio in dict.fromkeys(kinds):
        mine = [i for i, kind in enumerate(kinds) if kind == (decay, lr_ratio)]
        for numbers in _batches(mine, [x.numel() for x in tensors.masters]):
            some = tensors.some(numbers)
            dtype = some.masters[0].dtype
            # Not by torch's `grad_scale` or apex's `inv_scale`, which write them back.
            gradients = list(some.gradients)
            scaled = torch._foreach_mul(gradients, scale.to(dtype))  # pyright: ignore[reportPrivateImportUsage]
            if by_apex is not None:
                lists = [scaled, some.masters, some.first, some.second]
                lr = hyper.lr * lr_ratio
                step = AdamWStep(lr, hyper.beta1, hyper.beta2, hyper.eps, decay, hyper.step)
                apex_adamw(by_apex, lists, step, is_refused)
                continue
            before = torch.full((len(numbers),), hyper.step - 1.0, device=totals.device)
            adamw(
                list(some.masters), list(scaled), list(some.first), list(some.second), [],
                list(before.unbind()), fused=True, found_inf=is_refused.to(torch.float32),
                amsgrad=False, beta1=hyper.beta1, beta2=hyper.beta2, lr=hyper.lr * lr_ratio,
                weight_decay=decay, eps=hyper.eps, maximize=False,
            )  # fmt: skip
    pairs = zip(tensors.weights, tensors.masters, strict=True)
    copies = [(weight, master) for weight, master in pairs if weight is not None]
    if copies:
        weights, masters = zip(*copies, strict=True)
        torch._foreach_copy_(weights, masters)  # pyright: ignore[reportPrivateImportUsage]


def _batches(numbers: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    for number in numbers:
        if batch and sum(sizes[i] for i in batch) + sizes[number] > BATCH_ELEMENTS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
