"""Configuration of evaluations."""

from dataclasses import dataclass
from typing import Literal

from lcdist.config.fields import DEPTHS, PERCENT, SAMPLES, SEED, SEQLEN, TOKENS, above, at_least

# The parts of an evaluation; lcdist/evaluate/registry.py has the code of each.
Measure = Literal["perplexity", "passkey", "needle", "ruler"]
# RULER's tasks; lcdist/evaluate/tasks/ruler.py has the code of each.
RulerTask = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
]
# Average in percent.
EFFECTIVE_SCORE = 85.6


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What `lcdist evaluate` measures, and on how much text.

    Attributes:
        attention: Attention of evaluation and generation. `method`: as trained. `dense`: full
            attention in place of a sparse pattern. auto: dense if the pattern is for training only
            (scca), else method.
        lengths: Lengths in tokens at which the model is read.
        tokens: Tokens of held-out text that are scored at each length.
        measure: The parts, in the order in which they are measured. perplexity: by length. passkey:
            a number in a repeated text, by length. needle: one in held-out text, by length and
            depth. ruler: the synthetic tasks of RULER (arXiv:2404.06654).
        samples: Questions of each synthetic task at each length. The needle map divides them among
            its depths.
        seed: Of all that is drawn at random; nothing of a text's perplexity is.
    """

    attention: Literal["auto", "dense", "method"] = "auto"
    lengths: tuple[int, ...] = at_least(2, (512, 1024, 2048, 4096, 8192), SEQLEN)
    tokens: int = at_least(1, 65536, TOKENS)
    measure: tuple[Measure, ...] = ("perplexity",)
    samples: int = at_least(1, 50, SAMPLES)
    seed: int = at_least(0, 0, SEED)
    depths: int = at_least(1, 11, DEPTHS)  # of the needle map, evenly spaced from 0 to 100 %
    # How questions are put. text: as a text that ends where the answer begins. chat: as a turn of
    # the user, by the tokenizer's chat template, with the beginning of the answer.
    prompt: Literal["text", "chat"] = "text"
    # tasks of the part ruler; []: all, without those on held-out text if there is none
    ruler_tasks: tuple[RulerTask, ...] = ()
    # The effective length is the longest with an average of so many percent in RULER; RULER asks
    # for that of Llama-2-7B at 4,096 tokens.
    effective_score: float = above(0, EFFECTIVE_SCORE, PERCENT)
