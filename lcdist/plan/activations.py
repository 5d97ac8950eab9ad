"""Estimate the activations that a layer and the loss keep for backward, given a rung."""

from dataclasses import dataclass
from functools import cached_property

from lcdist.plan.rungs import LONG_SEQUENCE_TOKENS, SAVES_INPUTS, Rung
from lcdist.plan.states import StateEstimate
from lcdist.plan.zero import FP32_BYTES

INT64_BYTES = 8
# Tiles of the MLP have gate and up of this size, but at least so many tokens: with fewer, a matrix
# product spends its time on loading the weight.
CHUNK_BYTES = 2**27
CHUNK_TOKENS = 1024
# Logits of a micro-batch up to this size are kept until backward.
KEPT_LOGITS_BYTES = 2**32
# Otherwise chunks of the loss have so many tokens, where their logits fit the bytes. Each chunk
# reads and writes the fp32 gradient of the output weight: for 1,024 tokens that takes as long as
# the product itself.
LOSS_CHUNK_TOKENS = 4096
LOSS_CHUNK_BYTES = 2**30


@dataclass(frozen=True)
class ActivationEstimate(StateEstimate):
    """Bytes of one layer's and the loss's activations on a rank, and the chunk sizes."""

    @cached_property
    def rung(self) -> Rung:
        """The way to save memory."""
        raise NotImplementedError

    @property
    def recompute(self) -> str:
        """Activation checkpointing of a layer: a value of `train.recompute` other than "auto"."""
        return self.rung.recompute

    @property
    def offloads(self) -> bool:
        """Return whether what layers save waits for backward in the host's memory."""
        return self.rung.offload

    def mlp_chunk(self, tokens: int) -> int | None:
        """Return how many of a rank's `tokens` the MLP runs at once; None: all, no tiling."""
        train, model = self.shape.config.train, self.shape.config.model
        # Of batches longer than the training's, such as an evaluation's, the plan knows nothing.
        longer = tokens > max(self.shape.local_tokens, LONG_SEQUENCE_TOKENS)
        if not self.rung.tiled and (train.mlp == "whole" or not longer):
            return None
        gate_up = 2 * model.ffn_hidden_size // self._tp_size * self.shape.itemsize
        return min(train.mlp_chunk or max(CHUNK_BYTES // gate_up, CHUNK_TOKENS), tokens)

    def loss_chunk(self, tokens: int) -> int | None:
        """Return how many of a rank's `tokens` get logits at once; None: all, and they are kept."""
        train, row = self.shape.config.train, self._local_vocab_size * self.shape.itemsize
        large = train.loss == "auto" and tokens * row > KEPT_LOGITS_BYTES
        if not self.rung.chunked and not large:
            return None
        fitting = min(LOSS_CHUNK_BYTES // row, LOSS_CHUNK_TOKENS)
        fitting = max(fitting, CHUNK_BYTES // row, CHUNK_TOKENS)
        return min(train.loss_chunk or fitting, tokens)

    @property
    def layer_bytes(self) -> int:
        """Bytes one layer saves on the device for the backward pass of one micro-batch."""
        if self.recompute not in SAVES_INPUTS:
            return self.saved_bytes(selective=self.recompute == "selective")
        return 0 if self.offloads else self._hidden_bytes + self._kept_for_second_run

    @property
    def _kept_for_second_run(self) -> int:
        """Bytes of one layer that attention keeps where the rest of it is computed again."""
        return self._kept_bytes if self.recompute == "keep_attention" else 0

    @property
    def recompute_bytes(self) -> int:
        """Bytes that the backward pass of one layer recomputes and holds at the same time."""
        if self.recompute not in SAVES_INPUTS:
            return self.tile_bytes
        recomputed = self.tile_bytes + self.saved_bytes(selective=False)
        if self.offloads:
            # What is saved of the next layer is loaded while this one is used.
            return recomputed + self._hidden_bytes + self._kept_for_second_run
        # What attention keeps is saved already.
        return recomputed - self._kept_for_second_run

    @cached_property
    def _kept_bytes(self) -> int:
        """Bytes that attention needs of one layer beside q, k, v, on the fullest rank."""
        shape, parallel = self.shape, self.shape.config.parallel
        batch = shape.config.train.micro_batch_size
        return max(
            layer.method.kept_bytes(
                layer.options, shape.attention_shape(batch, tp_rank), shape.layout
            )
            for layer in dict.fromkeys(shape.layers)
            for tp_rank in range(parallel.tp_size)
        )

    @property
    def tile_bytes(self) -> int:
        """Most bytes that the backward pass of one MLP tile holds; 0 without tiling."""
        model = self.shape.config.model
        chunk = self.mlp_chunk(self.shape.local_tokens)
        if chunk is None:
            return 0
        # Gate and up, whose gradients take their place, z with its gradient, four hidden states.
        width = 4 * model.ffn_hidden_size // self._tp_size + 4 * model.hidden_size
        # Each weight's gradient: the fp32 sum over tiles, and this tile's part.
        weights = 3 * model.ffn_hidden_size // self._tp_size * model.hidden_size
        frozen = bool(self.shape.config.lora.rank)
        gradients = 0 if frozen else weights * (FP32_BYTES + self.shape.itemsize)
        return chunk * width * self.shape.itemsize + gradients

    @property
    def loss_bytes(self) -> tuple[int, int]:
        """(saved for backward, temporary buffers) of a micro-batch's loss, in bytes.

        Without hidden states and the output weight's gradient. The gradient of the logits takes
        their place.
        """
        tokens = self.shape.local_tokens
        # A sum of exponentials and a target for each token.
        saved, chunk = tokens * (FP32_BYTES + INT64_BYTES), self.loss_chunk(tokens)
        if chunk is None:
            return self.whole_logits_bytes + saved, 0
        return saved, chunk * self._local_vocab_size * self.shape.itemsize

    @property
    def whole_logits_bytes(self) -> int:
        """Logits of a micro-batch's tokens, for this rank's part of the vocabulary."""
        return self.shape.local_tokens * self._local_vocab_size * self.shape.itemsize

    def saved_bytes(self, selective: bool) -> int:
        """Return the bytes a layer saves for backward without full recompute.

        Args:
            selective: Whether norms and the MLP's activation are recomputed.
        """
        shape, model = self.shape, self.shape.config.model
        # Queries, keys and values; attention's output is among what it keeps.
        width = (model.nheads + 2 * shape.nheads_kv) * shape.head_dim
        norms = 1
        if self.mlp_chunk(shape.local_tokens) is None:
            width += (2 if selective else 3) * model.ffn_hidden_size
            norms = 2
        # Each half of the layer saves its input. A norm outside tiles saves its output and, for
        # each token, an fp32 number.
        hidden = 2 if selective else 2 + norms
        scales = norms * FP32_BYTES * (shape.local_tokens // self._hidden_parts)
        if model.qk_norm:
            # Norms of heads save what they read, and an fp32 number for each head.
            heads = model.nheads + shape.nheads_kv
            width += heads * shape.head_dim
            scales += FP32_BYTES * shape.local_tokens * heads // self._tp_size
        saved = shape.local_tokens * (width * shape.itemsize // self._tp_size)
        return saved + hidden * self._hidden_bytes + scales + self._kept_bytes

    @property
    def _tp_size(self) -> int:
        return self.shape.config.parallel.tp_size

    @property
    def _hidden_bytes(self) -> int:
        """Hidden states of a micro-batch on this rank, in bytes."""
        bytes_per_token = self.shape.itemsize * self.shape.config.model.hidden_size
        return self.shape.local_tokens * (bytes_per_token // self._hidden_parts)

    @property
    def _hidden_parts(self) -> int:
        """Ranks that share the hidden states of a micro-batch."""
        parallel = self.shape.config.parallel
        return parallel.tp_size if parallel.sequence_parallel else 1

    @property
    def _local_vocab_size(self) -> int:
        return self.shape.padded_vocab_size // self._tp_size

    @property
    def _chunks_in_flight(self) -> tuple[int, int]:
        """Forward passes of model chunks that wait for backward, on the (first, last) stage.

        1F1B and its interleaved form (arXiv:2104.04473).
        """
        parallel, num_micro_batches = self.shape.config.parallel, self.shape.num_micro_batches
        pp_size, vp_size = parallel.pp_size, parallel.vp_size
        if vp_size == 1:
            return min(pp_size, num_micro_batches), 1
        most, last = num_micro_batches * vp_size, (vp_size - 1) * pp_size + 1
        return min(most, last + 2 * (pp_size - 1)), min(most, last)
