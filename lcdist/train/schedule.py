"""Learning rate schedules: linear warmup, then cosine, warmup-stable-decay or constant."""

import math

from lcdist.config.schema import OptimConfig


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of step `step`, counted from 0, in a run of `steps` steps.

    cosine decays to min_lr at the last step (SGDR, arXiv:1608.03983). wsd is constant, then decays
    linearly to min_lr over the last decay_steps (MiniCPM, arXiv:2404.06395).
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    span = optim.lr - optim.min_lr
    if optim.schedule == "cosine":
        decay_steps = max(1, steps - optim.warmup_steps)
        progress = min(1.0, (step + 1 - optim.warmup_steps) / decay_steps)
        return optim.min_lr + span * 0.5 * (1 + math.cos(math.pi * progress))
    if optim.schedule == "wsd":
        remaining = max(0, steps - 1 - step)
        return optim.min_lr + span * min(1.0, remaining / optim.decay_steps)
    return optim.lr
