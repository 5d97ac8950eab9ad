"""Count floating-point operations a token."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from lcdist.plan.estimate import Estimate

# Training runs every matrix product once forward and twice backward.
TRAIN_FLOPS_FACTOR = 3


@dataclass(frozen=True)
class ComputeEstimate(Estimate):
    """Operations a token; a multiply-add is two."""

    @property
    def flops_per_token(self) -> float:
        """Operations to train on one token, attention counted over the scores it computes."""
        flops = self.product_flops_per_token + self.attention_flops_per_token
        return TRAIN_FLOPS_FACTOR * flops - self.frozen_flops_per_token

    @property
    def flops_per_token_square(self) -> float:
        """Like `flops_per_token`, with attention counted over all scores, as without a mask."""
        model, shape = self.shape.config.model, self.shape
        square = 4 * shape.seqlen * model.nheads * shape.head_dim * model.num_layers
        flops = self.product_flops_per_token + square
        return TRAIN_FLOPS_FACTOR * flops - self.frozen_flops_per_token

    @property
    def product_flops_per_token(self) -> int:
        """Forward operations of all products with weights: layers and output."""
        model, counts = self.shape.config.model, self.parameters
        norms_and_biases = counts.layer_norms + counts.layer_biases
        layer = counts.layer - norms_and_biases + counts.layer_adapters(1)
        output = self.shape.padded_vocab_size * model.hidden_size
        return 2 * (model.num_layers * layer + output)

    @property
    def frozen_flops_per_token(self) -> int:
        """Operations of `product_flops_per_token` with frozen weights: they get no gradient."""
        model, lora = self.shape.config.model, self.shape.config.lora
        if not lora.rank:
            return 0
        trained = model.num_layers * self.parameters.layer_adapters(1)
        if lora.embeddings if model.tied_embeddings else lora.head:
            trained += self.shape.padded_vocab_size * model.hidden_size
        return self.product_flops_per_token - 2 * trained

    @cached_property
    def attention_flops_per_token(self) -> float:
        """Forward operations of all layers' attention, over the scores it computes."""
        shape = self.shape.attention_shape(batch=1)
        counts = Counter(self.shape.layers)
        flops = sum(n * layer.method.flops(layer.options, shape) for layer, n in counts.items())
        return flops / self.shape.seqlen
