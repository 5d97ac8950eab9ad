"""Compare both sides of a conversion, read from disk again, by their logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lcdist.checkpoint.tensors import CheckpointTensors
from lcdist.config.schema import Config
from lcdist.convert.huggingface.config import HFModel
from lcdist.convert.huggingface.custom_attention import (
    inference_layers,
    layer_tables,
    with_short_blocks,
)
from lcdist.convert.huggingface.names import head_dim
from lcdist.convert.huggingface.weights import Weights
from lcdist.convert.reference_forward import hf_frequencies, hf_logits
from lcdist.convert.streamed_forward import streamed_logits
from lcdist.model.rotary import attention_factor, inverse_frequencies
from lcdist.plan.resolve import document_layout_for
from lcdist.utils.progress import Progress, counter, silent

# Both sides compute in float64 from the same numbers, so only rounding remains.
TOLERANCE = 1e-8
NUM_TOKENS = 33


@dataclass(frozen=True)
class LogitDifference:
    """Maximum absolute difference of logits, and maximum absolute logit, over random tokens."""

    max_difference: float
    max_logit: float
    num_tokens: int

    def __str__(self) -> str:
        return (
            f"maximum difference of logits {self.max_difference:.2e}, in float64 over "
            f"{self.num_tokens} random tokens (maximum logit {self.max_logit:.3g})"
        )


class ConversionError(ValueError):
    """The result does not compute what the source computes: a bug in lcdist; nothing is kept."""


def compare(
    hf: HFModel,
    weights: Weights,
    config: Config,
    tensors: CheckpointTensors,
    progress: Progress = silent,
) -> LogitDifference:
    """Compare the logits of a Hugging Face folder with those of a checkpoint.

    Tokens that only the checkpoint has are left out. Methods are compared with short blocks and
    with landmarks inserted, so that the tokens span several blocks.

    Raises:
        ConversionError: logits or rotations differ by more than rounding.
    """
    compare_rotation(hf, config)
    vocab_size = min(hf.model.vocab_size, config.model.vocab_size)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(vocab_size, (NUM_TOKENS,), generator=generator)
    layers = with_short_blocks(inference_layers(hf.model, hf.attention))
    slots = document_layout_for(layers, vocab_size)
    tokens = slots.place(text, 0, slots.num_slots(NUM_TOKENS), NUM_TOKENS)
    count = counter("comparing", 2 * weights.nbytes, progress)
    theirs = hf_logits(hf.table, weights, tokens, layer_tables(layers))[:, :vocab_size]
    count(weights.nbytes)
    ours = streamed_logits(config, tensors, tokens, layers)[:, :vocab_size]
    count(weights.nbytes)
    difference = LogitDifference(_max_abs(theirs - ours), _max_abs(theirs), NUM_TOKENS)
    # Written as "not less or equal" so that NaN fails.
    if not difference.max_difference <= TOLERANCE * max(1.0, difference.max_logit):
        raise ConversionError(f"{difference}: this is more than rounding, and nothing is kept")
    return difference


def compare_rotation(hf: HFModel, config: Config) -> None:
    """Compare rotary frequencies at several lengths, from a few tokens to beyond the training's.

    Some rules scale only at lengths that the comparison of logits does not reach.

    Raises:
        ConversionError: frequencies or attention factors differ.
    """
    width = head_dim(config.model)
    for seqlen in (NUM_TOKENS, hf.seqlen, config.train.seqlen, 8 * config.train.seqlen):
        theirs, their_factor = hf_frequencies(hf.table, width, seqlen)
        ours = inverse_frequencies(config.model.rope, width, seqlen)
        difference = _max_abs(theirs / ours - 1)
        our_factor = attention_factor(config.model.rope)
        if not max(difference, abs(their_factor - our_factor)) <= TOLERANCE:
            raise ConversionError(
                f"rotation at {seqlen} tokens: relative difference of frequencies "
                f"{difference:.2e}; attention factors: Hugging Face {their_factor}, lcdist "
                f"{our_factor}; nothing is kept"
            )


def _max_abs(x: Tensor) -> float:
    return x.abs().max().item()
