"""Low-rank adapters: what they are put on and what is trained beside them."""

from dataclasses import dataclass
from typing import Literal

from lcdist.config.fields import above, at_least

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA (arXiv:2106.09685): weights stay as they are and get a product of rank `rank` added.

    rank: 0 is off. targets: projections with an adapter; `k` is what stands in the key's place, T
    with coca. embeddings, norms, head: trained whole; LongLoRA's setting (arXiv:2309.12307) is
    embeddings and norms. lr_ratio: learning rate of B over that of everything else (LoRA+,
    arXiv:2402.12354). load: a folder in PEFT's format whose adapter a new run starts from.
    """

    rank: int = at_least(0, 0)
    alpha: float = above(0, 16.0)  # the product counts alpha / rank
    targets: tuple[Target, ...] = ("q", "k", "v", "o")
    embeddings: bool = False
    norms: bool = False
    head: bool = False
    lr_ratio: float = above(0, 1.0)
    load: str = ""

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank
