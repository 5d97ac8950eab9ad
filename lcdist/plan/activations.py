"""What a rank keeps between forward and backward: how the run chooses it, and how many bytes."""

from dataclasses import dataclass, replace

from lcdist.plan.memory import CHUNK_BYTES, CHUNK_TOKENS, FP32_BYTES, INT64_BYTES, Footprint

# Up to here a rank keeps what it computes: above, activations are what fills its memory.
MANY_TOKENS = 16_384


@dataclass(frozen=True)
class Activations(Footprint):
    """The footprint's facts, and what follows from them for activations, in bytes per rank.

    may_offload: whether `train.offload = "auto"` may choose the host's memory.
    """

    may_offload: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on a rank."""
        return self.config.train.micro_batch_size * self.layout.local_seqlen

    @property
    def recompute(self) -> str:
        """What backward computes again of a layer: "none", "selective" or "full"."""
        train = self.config.train
        if train.recompute != "auto":
            return train.recompute
        return "full" if self.tokens > MANY_TOKENS or train.offload == "host" else "none"

    @property
    def offloads(self) -> bool:
        """Whether the layers' inputs wait for backward in the host's memory."""
        offload = self.config.train.offload
        if offload != "auto":
            return offload == "host"
        return self.may_offload and self.tokens > MANY_TOKENS and self.recompute == "full"

    def mlp_chunk(self, tokens: int) -> int | None:
        """How many of a rank's `tokens` go through the MLP at once; None: all, and kept."""
        train, model = self.config.train, self.config.model
        if train.mlp == "whole" or (train.mlp == "auto" and tokens <= MANY_TOKENS):
            return None
        gate_up = 2 * model.ffn_hidden_size // self.config.parallel.tp_size * self.itemsize
        return min(train.mlp_chunk or max(CHUNK_BYTES // gate_up, CHUNK_TOKENS), tokens)

    def loss_chunk(self, tokens: int) -> int | None:
        """How many of a rank's `tokens` get logits at once for the loss; None: all, and kept."""
        train = self.config.train
        if train.loss == "whole" or (train.loss == "auto" and tokens <= MANY_TOKENS):
            return None
        fitting = max(CHUNK_BYTES // (FP32_BYTES * self._local_vocab_size), CHUNK_TOKENS)
        return min(train.loss_chunk or fitting, tokens)

    @property
    def activation_bytes(self) -> int:
        """What forward keeps for backward on the fullest rank, with what loss and MLP need.

        Counted tensor by tensor for full attention as it runs on a CPU: within 2 % of what
        autograd saves there, on meshes without pipelining. Fused norms on a GPU would keep less;
        `attention.impl = "reference"` keeps dense scores on top; frozen weights keep less. The
        working memory of backward itself is not in it, but for the one layer that full recompute
        computes again, and a tile of the MLP.
        """
        layers, again = self._chunk_layers * self.layer_bytes, self.again_bytes
        first, last = (layers * chunks for chunks in self._chunks_in_flight)
        kept_by_loss, work = self.loss_bytes
        # The loss has done its work when the first layer is computed again.
        after = last + 3 * self._hidden_bytes + kept_by_loss + max(again, work)
        return max(first + again, after)

    @property
    def layer_bytes(self) -> int:
        """What one layer keeps on the device for the backward of one micro-batch."""
        if self.recompute != "full":
            return self._kept(selective=self.recompute == "selective")
        return 0 if self.offloads else self._hidden_bytes

    @property
    def again_bytes(self) -> int:
        """What one layer's backward makes again, and has at most for itself."""
        again = self.tile_bytes
        if self.recompute == "full":
            # Of the host's, the next one is on its way while one is used.
            again += self._kept(selective=False) + (self._hidden_bytes if self.offloads else 0)
        return again

    @property
    def tile_bytes(self) -> int:
        """What the backward of a tile of the MLP has at most; 0 where it runs whole."""
        model, tp_size = self.config.model, self.config.parallel.tp_size
        chunk = self.mlp_chunk(self.tokens)
        if chunk is None:
            return 0
        # Gate, up and their product, and a gradient of each; then of each weight a sum and a part.
        width = 6 * model.ffn_hidden_size // tp_size + 4 * model.hidden_size
        weights = 3 * model.ffn_hidden_size // tp_size * model.hidden_size
        sums = 0 if self.config.lora.rank else weights * (FP32_BYTES + self.itemsize)
        return chunk * width * self.itemsize + sums

    @property
    def host_bytes(self) -> int:
        """Of the host's memory, what one rank fills with inputs of layers; 0 without offload."""
        if not self.offloads:
            return 0
        # Every tensor of pinned memory is rounded up to a power of two by torch.
        buffer = 1 << (self._hidden_bytes - 1).bit_length()
        return self._chunk_layers * max(self._chunks_in_flight) * buffer

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
    def memory_rows(self) -> list[tuple[str, str]]:
        """The choices as (what, how much), for people."""
        layer = f"{self.layer_bytes / 2**30:.3f} GiB a layer"
        chunk = self.mlp_chunk(self.tokens)
        rows = [
            ("MLP", "whole" if chunk is None else f"{chunk:,} tokens at a time"),
            ("recompute", f"{self.recompute}; kept for backward: {layer}"),
        ]
        return [*rows, ("offload", self._offload_said)]

    @property
    def _offload_said(self) -> str:
        host = "inputs of layers to {:.3f} GiB of host memory a rank"
        if self.offloads:
            return host.format(self.host_bytes / 2**30)
        elsewhere = replace(self, may_offload=True)
        if not elsewhere.offloads:
            return "none"
        there = host.format(elsewhere.host_bytes / 2**30)
        return (
            f"none; on a GPU whose host has the room, {there}, and "
            f"{elsewhere.activation_bytes / 2**30:.3f} GiB of activations"
        )

    def _kept(self, selective: bool) -> int:
        """What a layer keeps that is not computed again as a whole."""
        model, parallel = self.config.model, self.config.parallel
        # On one rank the values are a view that keeps the whole q, k, v projection alive.
        heads = (3 if parallel.cp_size == 1 else 2) * (model.nheads + self.nheads_kv)
        width = heads * self.head_dim
        # Of each half its input, and of its norm two steps more.
        hidden = 2 if selective else 6
        if self.mlp_chunk(self.tokens) is None:
            width += (2 if selective else 5) * model.ffn_hidden_size
        elif not selective:
            hidden = 4
        a_token = width * self.itemsize + FP32_BYTES * model.nheads
        return self.tokens * (a_token // parallel.tp_size) + hidden * self._hidden_bytes

    @property
    def _hidden_bytes(self) -> int:
        """Hidden states of a micro-batch, this rank's part of them."""
        parallel, hidden = self.config.parallel, self.itemsize * self.config.model.hidden_size
        return self.tokens * (hidden // (parallel.tp_size if parallel.sequence_parallel else 1))

    @property
    def _local_vocab_size(self) -> int:
        return self.padded_vocab_size // self.config.parallel.tp_size

    @property
    def _chunk_layers(self) -> int:
        parallel = self.config.parallel
        return self.config.model.num_layers // (parallel.pp_size * parallel.vp_size)

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
