"""Configuration of evaluations."""

from dataclasses import dataclass
from typing import Literal

from lcdist.config.fields import SAMPLES, SEED, SEQLEN, TOKENS, at_least

# The parts of an evaluation; lcdist/evaluate/registry.py has the code of each.
Measure = Literal["perplexity"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What `lcdist evaluate` measures, and on how much text.

    Attributes:
        attention: Attention of evaluation and generation. `method`: as trained. `dense`: full
            attention in place of a sparse pattern. auto: dense if the pattern is for training only
            (scca), else method.
        lengths: Lengths in tokens at which the model is read.
        tokens: Tokens of held-out text that are scored at each length.
        measure: The parts, in the order in which they are measured. perplexity: by length.
        samples: Questions of each synthetic task at each length.
        seed: Of all that is drawn at random; nothing of a text's perplexity is.
    """

    attention: Literal["auto", "dense", "method"] = "auto"
    lengths: tuple[int, ...] = at_least(2, (512, 1024, 2048, 4096, 8192), SEQLEN)
    tokens: int = at_least(1, 65536, TOKENS)
    measure: tuple[Measure, ...] = ("perplexity",)
    samples: int = at_least(1, 50, SAMPLES)
    seed: int = at_least(0, 0, SEED)
