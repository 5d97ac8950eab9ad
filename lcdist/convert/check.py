"""What ends every conversion: both sides read from disk again, and their logits compared."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lcdist.checkpoint.tensors import Stored
from lcdist.config.schema import Config
from lcdist.convert.huggingface.config import HFModel
from lcdist.convert.huggingface.custom_attention import reading, shrunk, tables
from lcdist.convert.huggingface.names import head_dim
from lcdist.convert.huggingface.weights import Weights
from lcdist.convert.reference_forward import hf_frequencies, hf_logits
from lcdist.convert.streamed_forward import our_logits
from lcdist.model.rotary import attention_factor, inverse_frequencies
from lcdist.plan.resolve import document_layout_for

# Both sides compute in float64 from the same numbers: what remains is rounding.
TOLERANCE = 1e-8
TOKENS = 33


@dataclass(frozen=True)
class Difference:
    """The greatest difference of logits, and the greatest logit, over `tokens` random tokens."""

    greatest: float
    logit: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"greatest difference of logits {self.greatest:.2e}, in float64 over {self.tokens} "
            f"random tokens (greatest logit {self.logit:.3g})"
        )


class ConversionError(ValueError):
    """What was written does not compute what was read: a fault of ours, and nothing is kept."""


def compare(hf: HFModel, weights: Weights, config: Config, stored: Stored) -> Difference:
    """Compare a Hugging Face folder with a checkpoint. Raises ConversionError beyond rounding.

    A checkpoint may have tokens that the folder lacks: these are left out. Methods are compared
    with short blocks, landmarks put in, so that the tokens reach across several.
    """
    compare_rotation(hf, config)
    vocab_size = min(hf.model.vocab_size, config.model.vocab_size)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (TOKENS,), generator=generator)
    layers = shrunk(reading(hf.model, hf.attention))
    slots = document_layout_for(layers, vocab_size)
    tokens = slots.place(tokens, 0, slots.num_slots(TOKENS), TOKENS)
    theirs = hf_logits(hf.table, weights, tokens, tables(layers))[:, :vocab_size]
    ours = our_logits(config, stored, tokens, layers)[:, :vocab_size]
    found = Difference(_greatest(theirs - ours), _greatest(theirs), TOKENS)
    # Not "greater than": a number that is none has to fail.
    if not found.greatest <= TOLERANCE * max(1.0, found.logit):
        raise ConversionError(f"{found}: this is no rounding, and nothing is kept")
    return found


def compare_rotation(hf: HFModel, config: Config) -> None:
    """Raise ConversionError unless both sides rotate alike, for short texts and as long as trained.

    A few tokens do not reach the lengths where some rules begin to scale.
    """
    width = head_dim(config.model)
    for seqlen in (TOKENS, hf.seqlen, config.train.seqlen, 8 * config.train.seqlen):
        theirs, their_factor = hf_frequencies(hf.table, width, seqlen)
        ours = inverse_frequencies(config.model.rope, width, seqlen)
        away = _greatest(theirs / ours - 1)
        our_factor = attention_factor(config.model.rope)
        if not max(away, abs(their_factor - our_factor)) <= TOLERANCE:
            raise ConversionError(
                f"rotation at {seqlen} tokens: frequencies differ by up to {away:.2e} of their "
                f"size, factors are {their_factor} there and {our_factor} here; nothing is kept"
            )


def _greatest(x: Tensor) -> float:
    return x.abs().max().item()
