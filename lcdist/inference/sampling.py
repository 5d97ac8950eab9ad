"""Choose the next token from a model's logits."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Choose the next token by a temperature and a seed.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        seed: Of the generator, equal on all tensor-parallel ranks.
    """

    temperature: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        if self.temperature == 0:
            return "always the most likely token"
        return f"temperature {self.temperature:g}, seed {self.seed}, from the whole vocabulary"

    def generator(self) -> torch.Generator:
        """Return the generator of one text."""
        return torch.Generator().manual_seed(self.seed)

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Return one token, int64 `[1]`, from logits fp32 `[vocab]` on the CPU."""
        if self.temperature == 0:
            return logits.argmax()[None]
        return torch.multinomial((logits / self.temperature).softmax(-1), 1, generator=generator)


GREEDY = Sampling()
