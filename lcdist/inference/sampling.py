"""Choose the next token from a model's logits."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Choose the next token by a temperature, limits and a seed.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        seed: Of the generators, equal on all ranks.
        top_k: Only so many of the most likely tokens are chosen from; None: all.
        top_p: Only the most likely tokens that together have this probability are chosen from, the
            one that reaches it included (arXiv:1904.09751); 1: all.
    """

    temperature: float = 0.0
    seed: int = 0
    top_k: int | None = None
    top_p: float = 1.0

    def __str__(self) -> str:
        if self.temperature == 0:
            return "always the most likely token"
        limits = [] if self.top_k is None else [f"the {self.top_k} most likely tokens"]
        if self.top_p < 1:
            limits.append(f"the most likely tokens of probability {self.top_p:g}")
        chosen = " and ".join(limits) or "the whole vocabulary"
        return f"temperature {self.temperature:g}, seed {self.seed}, from {chosen}"

    def generator(self, text: int = 0) -> torch.Generator:
        """Return the generator of one text, by its number, so that texts do not share one."""
        return torch.Generator().manual_seed(self.seed + (text << 32))

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Return one token, int64 `[1]`, from logits fp32 `[vocab]` on the CPU."""
        if self.temperature == 0:
            return logits.argmax()[None]
        likely, tokens = (logits / self.temperature).sort(descending=True, stable=True)
        likely = likely[: self.top_k].softmax(-1)
        if self.top_p < 1:
            # What comes before a token does not reach top_p.
            likely = likely[likely.cumsum(-1) - likely < self.top_p]
        return tokens[torch.multinomial(likely, 1, generator=generator)]


GREEDY = Sampling()
