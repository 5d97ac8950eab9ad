"""What a rank holds of a run: its share of parameters, optimizer state and activations."""

from dataclasses import dataclass
from functools import cached_property
from math import lcm, prod

from lcdist.config.schema import Config
from lcdist.layer_methods import LayerAttention
from lcdist.layout import ContextLayout

VOCAB_MULTIPLE = 128
FP32_BYTES = 4
INT64_BYTES = 8
ITEMSIZE = {"fp32": 4, "bf16": 2}
# Up to here the loss keeps whole logits: below, they are not what fills the memory.
WHOLE_LOGITS_TOKENS = 16_384
# A chunk of the loss: fp32 logits of this size, but so many tokens at least: with fewer, a matrix
# product spends its time on fetching the weight.
CHUNK_BYTES = 2**27
CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Footprint:
    """The facts a run is resolved to, and what follows from them for a rank's memory, in bytes.

    config: as given. seqlen (of `layout`) is the training length padded so that the layout cuts
    it evenly. layers: the attention of every layer. dtype: of the weights, "fp32" or "bf16".
    """

    config: Config
    world_size: int
    dp_size: int
    layers: tuple[LayerAttention, ...]
    layout: ContextLayout
    dtype: str

    @property
    def seqlen(self) -> int:
        """Tokens of a sample as the model sees it, padding included."""
        return self.layout.seqlen

    @property
    def num_micro_batches(self) -> int:
        """Forward and backward passes a step on each data-parallel rank."""
        train = self.config.train
        return train.global_batch_size // (train.micro_batch_size * self.dp_size)

    @property
    def itemsize(self) -> int:
        """Bytes of one weight or activation."""
        return ITEMSIZE[self.dtype]

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        model = self.config.model
        return model.head_dim or model.hidden_size // model.nheads

    @property
    def nheads_kv(self) -> int:
        """Key and value heads of the whole model."""
        return self.config.model.nheads_kv or self.config.model.nheads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up; padding never takes part in a loss."""
        step = lcm(VOCAB_MULTIPLE, self.config.parallel.tp_size)
        return -(-self.config.model.vocab_size // step) * step

    @cached_property
    def stage_layers(self) -> tuple[tuple[int, ...], ...]:
        """The numbers of the layers that each pipeline stage holds, from 0."""
        parallel = self.config.parallel
        chunk = self.config.model.num_layers // (parallel.pp_size * parallel.vp_size)
        # Interleaving deals chunks out to the stages in turn.
        firsts = [
            [(turn * parallel.pp_size + stage) * chunk for turn in range(parallel.vp_size)]
            for stage in range(parallel.pp_size)
        ]
        return tuple(tuple(first + i for first in stage for i in range(chunk)) for stage in firsts)

    def learnable_extras(self, layer: int) -> int:
        """Parameters that the attention of layer number `layer` learns beside its projections."""
        chosen = self.layers[layer]
        sizes = chosen.method.parameters(chosen.options, self.config.model.nheads).values()
        return sum(prod(size) for size in sizes)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer, learnable extras of its attention left out."""
        model = self.config.model
        width = self.head_dim * (2 * model.nheads + 2 * self.nheads_kv)
        return model.hidden_size * (width + 3 * model.ffn_hidden_size + 2)

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, padding of the vocabulary included."""
        model = self.config.model
        tables = 1 if model.tied_embeddings else 2
        outside = (tables * self.padded_vocab_size + 1) * model.hidden_size
        extras = sum(map(self.learnable_extras, range(model.num_layers)))
        return outside + model.num_layers * self.layer_parameters + extras

    @property
    def stage_parameters(self) -> tuple[int, int]:
        """Parameters one rank holds on the (first, last) pipeline stage; one stage is both."""
        model, parallel = self.config.model, self.config.parallel
        norms = 2 * model.hidden_size
        layer = (self.layer_parameters - norms) // parallel.tp_size + norms
        first, last = (
            sum(layer + self.learnable_extras(n) // parallel.tp_size for n in stage)
            for stage in (self.stage_layers[0], self.stage_layers[-1])
        )
        table = self.padded_vocab_size // parallel.tp_size * model.hidden_size
        if parallel.pp_size == 1:
            whole = first + (1 if model.tied_embeddings else 2) * table + model.hidden_size
            return whole, whole
        # Tied embeddings are held twice: the last stage has a copy.
        return first + table, last + table + model.hidden_size

    @property
    def state_bytes(self) -> int:
        """Weights, fp32 gradients and this rank's part of AdamW's fp32 state, on the fullest rank.

        The optimizer shares out whole tensors, so its part is taken as an even share, or as the
        largest tensor where that is more; the fullest rank holds at most both together.
        """
        model, parallel = self.config.model, self.config.parallel
        local = max(self.stage_parameters)
        rows = max(self.padded_vocab_size, 2 * model.ffn_hidden_size) // parallel.tp_size
        share = max(-(-local // (self.dp_size * parallel.cp_size)), rows * model.hidden_size)
        master = FP32_BYTES if self.itemsize < FP32_BYTES else 0
        return local * (self.itemsize + FP32_BYTES) + share * (2 * FP32_BYTES + master)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint, all ranks' files together: weights and AdamW's state."""
        master = FP32_BYTES if self.itemsize < FP32_BYTES else 0
        return self.num_parameters * (self.itemsize + 2 * FP32_BYTES + master)

    @property
    def activation_bytes(self) -> int:
        """What forward keeps for backward on the fullest rank, with what the loss needs.

        Counted tensor by tensor for full attention as it runs on a CPU: within 2 % of what
        autograd saves there, on meshes without pipelining. Fused norms on a GPU would keep less;
        `attention.impl = "reference"` keeps dense scores on top. The working memory of backward
        itself is not in it, but for the one layer that full recompute computes again.
        """
        model, parallel, recompute = self.config.model, self.config.parallel, self._recomputes
        tp_size, hidden = parallel.tp_size, self.itemsize * model.hidden_size
        hidden //= tp_size if parallel.sequence_parallel else 1
        # On one rank the values are a view that keeps the whole q, k, v projection alive.
        heads = (3 if parallel.cp_size == 1 else 2) * (model.nheads + self.nheads_kv)
        width = heads * self.head_dim + 5 * model.ffn_hidden_size
        layer = 6 * hidden + (width * self.itemsize + FP32_BYTES * model.nheads) // tp_size
        kept = hidden if recompute else layer
        chunk = model.num_layers // (parallel.pp_size * parallel.vp_size)
        first, last = (chunk * kept * chunks for chunks in self._chunks_in_flight)
        last += 3 * hidden
        again = layer if recompute else 0
        kept_by_loss, work = self.loss_bytes
        # The loss has done its work when the first layer is computed again.
        after = self.tokens * last + kept_by_loss + max(self.tokens * again, work)
        return max(self.tokens * (first + again), after)

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on a rank."""
        return self.config.train.micro_batch_size * self.layout.local_seqlen

    def loss_chunk(self, tokens: int) -> int | None:
        """How many of a rank's `tokens` get logits at once for the loss; None: all, and kept."""
        train = self.config.train
        if train.loss == "whole" or (train.loss == "auto" and tokens <= WHOLE_LOGITS_TOKENS):
            return None
        fitting = max(CHUNK_BYTES // (FP32_BYTES * self._local_vocab_size), CHUNK_TOKENS)
        return min(train.loss_chunk or fitting, tokens)

    @property
    def loss_bytes(self) -> tuple[int, int]:
        """(kept for backward, used while at work) by the loss of a micro-batch, hidden states and
        the output weight's gradient left out."""
        chunk = self.loss_chunk(self.tokens)
        if chunk is None:
            return self.whole_logits_bytes, 0
        # Beside the chunk's fp32 logits, their gradient as the matrix products take it.
        narrow = self.itemsize if self.itemsize < FP32_BYTES else 0
        work = chunk * self._local_vocab_size * (FP32_BYTES + narrow)
        return self.tokens * (FP32_BYTES + INT64_BYTES), work

    @property
    def whole_logits_bytes(self) -> int:
        """Fp32 logits of a micro-batch's tokens, this rank's part of the vocabulary."""
        return self.tokens * FP32_BYTES * self._local_vocab_size

    @property
    def _local_vocab_size(self) -> int:
        return self.padded_vocab_size // self.config.parallel.tp_size

    @property
    def _recomputes(self) -> bool:
        return self.config.train.recompute == "full"

    @property
    def _chunks_in_flight(self) -> tuple[int, int]:
        """Forward passes of model chunks whose backward waits, on the (first, last) stage.

        1F1B and its interleaved form (arXiv:2104.04473).
        """
        pp_size, vp_size = self.config.parallel.pp_size, self.config.parallel.vp_size
        if vp_size == 1:
            return min(pp_size, self.num_micro_batches), 1
        most, last = self.num_micro_batches * vp_size, (vp_size - 1) * pp_size + 1
        return min(most, last + 2 * (pp_size - 1)), min(most, last)
