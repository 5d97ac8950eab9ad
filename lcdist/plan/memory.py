"""Estimate memory per rank, and choose recomputation, offload and chunk sizes."""

from dataclasses import dataclass
from functools import cached_property

from lcdist.attention.facts import out_and_lse
from lcdist.plan.parameters import ParameterCounts
from lcdist.plan.shape import RunShape

FP32_BYTES = 4
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
# With more tokens a rank, activations fill the memory: "auto" then recomputes, offloads and tiles.
LONG_SEQUENCE_TOKENS = 16_384
# Recomputation that saves layer inputs, which may be offloaded.
SAVES_INPUTS = ("keep_attention", "full")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per rank: weights, gradients, optimizer states and activations.

    Attributes:
        shape: The run.
        parameters: Numbers of parameters.
        may_offload: Whether `train.offload = "auto"` may use the host's memory.
    """

    shape: RunShape
    parameters: ParameterCounts
    may_offload: bool

    # --- weights and states -----------------------------------------------------------------------

    @property
    def state_bytes(self) -> int:
        """Weights, fp32 gradients and this rank's part of AdamW's fp32 state, on the fullest rank.

        The optimizer distributes whole tensors. Its part is taken as an even share, or as the
        largest tensor where that is more; the fullest rank holds at most both together.
        """
        parallel, counts = self.shape.config.parallel, self.parameters
        even_share = -(-max(counts.trained_stages) // (self.shape.dp_size * parallel.cp_size))
        optimizer_elements = max(even_share, counts.largest_trained)
        weights_and_gradients = max(
            weights * self.shape.itemsize + gradients * FP32_BYTES
            for weights, gradients in zip(counts.stages, counts.trained_stages, strict=True)
        )
        return weights_and_gradients + optimizer_elements * self._optimizer_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint, files of all ranks together: weights and AdamW's state."""
        states = self.parameters.trained * self._optimizer_bytes
        return self.parameters.total * self.shape.itemsize + states

    @property
    def device_bytes(self) -> int:
        """Weights, states and activations on the fullest rank."""
        return self.state_bytes + self.activation_bytes

    @property
    def _optimizer_bytes(self) -> int:
        """AdamW's bytes a parameter: two moments, and a master weight beside bf16 weights."""
        master = FP32_BYTES if self.shape.itemsize < FP32_BYTES else 0
        return 2 * FP32_BYTES + master

    # --- choices ----------------------------------------------------------------------------------

    @property
    def recompute(self) -> str:
        """Activation checkpointing of a layer: a value of `train.recompute` other than "auto"."""
        train = self.shape.config.train
        if train.recompute != "auto":
            return train.recompute
        return "full" if self._is_long or train.offload == "host" else "none"

    @property
    def offloads(self) -> bool:
        """Return whether layer inputs wait for backward in the host's memory."""
        offload = self.shape.config.train.offload
        if offload != "auto":
            return offload == "host"
        return self.may_offload and self._is_long and self.recompute in SAVES_INPUTS

    def mlp_chunk(self, tokens: int) -> int | None:
        """Return how many of a rank's `tokens` the MLP runs at once; None: all, no tiling."""
        train, model = self.shape.config.train, self.shape.config.model
        if train.mlp == "whole" or (train.mlp == "auto" and tokens <= LONG_SEQUENCE_TOKENS):
            return None
        gate_up = 2 * model.ffn_hidden_size // self._tp_size * self.shape.itemsize
        return min(train.mlp_chunk or max(CHUNK_BYTES // gate_up, CHUNK_TOKENS), tokens)

    def loss_chunk(self, tokens: int) -> int | None:
        """Return how many of a rank's `tokens` get logits at once; None: all, and they are kept."""
        train, row = self.shape.config.train, self._local_vocab_size * self.shape.itemsize
        if train.loss == "whole" or (train.loss == "auto" and tokens * row <= KEPT_LOGITS_BYTES):
            return None
        fitting = min(LOSS_CHUNK_BYTES // row, LOSS_CHUNK_TOKENS)
        fitting = max(fitting, CHUNK_BYTES // row, CHUNK_TOKENS)
        return min(train.loss_chunk or fitting, tokens)

    @property
    def _is_long(self) -> bool:
        return self.shape.local_tokens > LONG_SEQUENCE_TOKENS

    # --- activations ------------------------------------------------------------------------------

    @property
    def activation_bytes(self) -> int:
        """Activations saved for backward on the fullest rank, and the loss's and MLP's buffers.

        Counted tensor by tensor for full attention on a CPU: within 2 % of what autograd saves
        there, on meshes without pipelining. `attention.impl = "reference"` saves dense scores on
        top; frozen weights save less. Temporary memory of backward is left out, except for the one
        layer that full recompute computes again, and a tile of the MLP.
        """
        layers, recomputed = self.shape.chunk_layers * self.layer_bytes, self.recompute_bytes
        first, last = (layers * chunks for chunks in self._chunks_in_flight)
        saved_by_loss, loss_buffers = self.loss_bytes
        # The loss has finished when the first layer is recomputed.
        last += 2 * self._hidden_bytes + saved_by_loss + max(recomputed, loss_buffers)
        return max(first + recomputed, last)

    @property
    def layer_bytes(self) -> int:
        """Bytes one layer saves on the device for the backward pass of one micro-batch."""
        if self.recompute not in SAVES_INPUTS:
            return self.saved_bytes(selective=self.recompute == "selective")
        return 0 if self.offloads else self._hidden_bytes + self._kept_bytes

    @property
    def recompute_bytes(self) -> int:
        """Bytes that the backward pass of one layer recomputes and holds at the same time."""
        if self.recompute not in SAVES_INPUTS:
            return self.tile_bytes
        recomputed = self.tile_bytes + self.saved_bytes(selective=False)
        if self.offloads:
            # What is saved of the next layer is loaded while this one is used.
            return recomputed + self._hidden_bytes + self._kept_bytes
        if self.recompute == "keep_attention":
            # Out and lse are those that are saved.
            train, shape = self.shape.config.train, self.shape
            one = shape.attention_shape(train.micro_batch_size, tp_rank=0)
            recomputed -= out_and_lse(None, one, shape.layout)
        return recomputed

    @cached_property
    def _kept_bytes(self) -> int:
        """Bytes that attention keeps of one layer for its second run, on the fullest rank."""
        if self.recompute != "keep_attention":
            return 0
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
    def host_bytes(self) -> int:
        """Host memory that one rank fills with what is saved of layers; 0 without offload."""
        if not self.offloads:
            return 0
        buffers = _pinned_bytes(self._hidden_bytes)
        if self.recompute == "keep_attention":
            width = self.shape.config.model.nheads // self._tp_size * self.shape.head_dim
            out = self.shape.local_tokens * width * self.shape.itemsize
            buffers += _pinned_bytes(out) + _pinned_bytes(self._kept_bytes - out)
        return self.shape.chunk_layers * max(self._chunks_in_flight) * buffers

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
        shape, model, parallel = self.shape, self.shape.config.model, self.shape.config.parallel
        # On one rank the values are a view that keeps the whole q, k, v projection alive.
        heads = (3 if parallel.cp_size == 1 else 2) * (model.nheads + shape.nheads_kv)
        width = heads * shape.head_dim
        norms = 1
        if self.mlp_chunk(shape.local_tokens) is None:
            width += (2 if selective else 3) * model.ffn_hidden_size
            norms = 2
        # Each half of the layer saves its input. A norm outside tiles saves its output and, for
        # each token, an fp32 number.
        hidden = 2 if selective else 2 + norms
        scales = norms * FP32_BYTES * (shape.local_tokens // self._hidden_parts)
        # The softmax statistics of attention are fp32.
        bytes_per_token = width * shape.itemsize + FP32_BYTES * model.nheads
        attention_and_mlp = shape.local_tokens * (bytes_per_token // self._tp_size)
        return attention_and_mlp + hidden * self._hidden_bytes + scales

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


def _pinned_bytes(count: int) -> int:
    """Return what `count` bytes of one tensor take: torch rounds pinned memory to powers of two."""
    return 1 << (count - 1).bit_length()
