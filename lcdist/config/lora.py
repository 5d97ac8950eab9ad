"""Configuration of low-rank adapters and of the modules trained with them."""

from dataclasses import dataclass
from typing import Literal

from lcdist.config.fields import FACTOR, FEATURES, above, at_least

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA (arXiv:2106.09685): weights are frozen, and a product of rank `rank` is added to each.

    Attributes:
        rank: 0 turns LoRA off.
        alpha: The product is multiplied by alpha / rank.
        targets: Projections with an adapter. With coca, `k` is the projection to T, which replaces
            the keys.
        embeddings: Whether the embedding is trained in full. LongLoRA (arXiv:2309.12307) trains
            embeddings and norms.
        norms: Whether the norms are trained.
        head: Whether the output layer is trained in full.
        lr_ratio: Learning rate of B over that of all other parameters (LoRA+, arXiv:2402.12354).
        load: Folder in PEFT's format with the adapter that a new run starts from.
    """

    rank: int = at_least(0, 0, FEATURES)
    alpha: float = above(0, 16.0, FACTOR)
    targets: tuple[Target, ...] = ("q", "k", "v", "o")
    embeddings: bool = False
    norms: bool = False
    head: bool = False
    lr_ratio: float = above(0, 1.0, FACTOR)
    load: str = ""

    @property
    def scale(self) -> float:
        """Factor of the product B A."""
        return self.alpha / self.rank
