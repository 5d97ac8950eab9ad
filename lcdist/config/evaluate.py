"""Configuration of evaluations."""

from dataclasses import dataclass
from typing import Literal

from lcdist.config.fields import (
    BINS,
    DEPTHS,
    NATS,
    PERCENT,
    SAMPLES,
    SEED,
    SEQLEN,
    TOKENS,
    above,
    at_least,
)

# The parts of an evaluation; lcdist/evaluate/registry.py has the code of each.
Measure = Literal["perplexity", "position", "longppl", "passkey", "needle", "ruler"]
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
    """Set what `lcdist evaluate` measures, and on how much text.

    Attributes:
        attention: Attention of evaluation and generation. `method`: as trained. `dense`: full
            attention in place of a sparse pattern. auto: dense if the pattern is for training only
            (scca), else method.
        lengths: Lengths in tokens at which the model is read.
        tokens: Tokens of held-out text that are scored at each length.
        measure: The parts, in the order in which they are measured. perplexity: by length.
            position: loss by the number of tokens before, in windows of the longest length.
            longppl: perplexity of the tokens that long context helps to predict
            (arXiv:2410.23771), in windows of the longest length. passkey: a number in a repeated
            text, by length. needle: one in held-out text, by length and depth. ruler: the synthetic
            tasks of RULER (arXiv:2404.06654).
        samples: Questions of each synthetic task at each length. The needle map divides them among
            its depths.
        seed: Of all that is drawn at random; nothing of a text's perplexity is.
        bins: Of positions, equally wide.
        marker: Checkpoint that says which tokens longppl scores; empty: the model itself. It needs
            the same tokenizer.
        short_context: Least number of tokens that the short context of longppl has.
        short_step: Tokens that share the beginning of a short context, which grows meanwhile.
        key_gain: Longppl scores a token if long context lowers its loss by more, in nats,
        key_loss: and if its loss with long context is lower, in nats.
        device_blocks: Blocks of a text and key head that landmark attention with top_k keeps on the
            device while it answers questions, the rest being in host memory; 0: all of them. The
            answers are the same.
    """

    attention: Literal["auto", "dense", "method"] = "auto"
    lengths: tuple[int, ...] = at_least(2, (512, 1024, 2048, 4096, 8192), SEQLEN)
    tokens: int = at_least(1, 65536, TOKENS)
    measure: tuple[Measure, ...] = ("perplexity",)
    samples: int = at_least(1, 50, SAMPLES)
    seed: int = at_least(0, 0, SEED)
    bins: int = at_least(1, 32, BINS)
    marker: str = ""
    short_context: int = at_least(1, 4096, SEQLEN)
    short_step: int = at_least(1, 1024, SEQLEN)
    key_gain: float = at_least(0, 2.0, NATS)
    key_loss: float = above(0, 2.0, NATS)
    device_blocks: int = at_least(0, 0, SEQLEN)
    depths: int = at_least(1, 11, DEPTHS)  # of the needle map, evenly spaced from 0 to 100 %
    # How questions are put. text: as a text that ends where the answer begins. chat: as a turn of
    # the user, by the tokenizer's chat template, with the beginning of the answer.
    prompt: Literal["text", "chat"] = "text"
    # tasks of the part ruler; []: all, without those on held-out text if there is none
    ruler_tasks: tuple[RulerTask, ...] = ()
    # The effective length is the longest with an average of so many percent in RULER; RULER asks
    # for that of Llama-2-7B at 4,096 tokens.
    effective_score: float = above(0, EFFECTIVE_SCORE, PERCENT)
