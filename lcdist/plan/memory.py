"""What a rank holds of a run for as long as it runs: its share of parameters and their states."""

from dataclasses import dataclass
from functools import cached_property
from math import lcm, prod

from lcdist.config.lora_sizes import adapter_tensors
from lcdist.config.schema import Config
from lcdist.layout import ContextLayout
from lcdist.plan.resolve import LayerAttention

VOCAB_MULTIPLE = 128
FP32_BYTES = 4
INT64_BYTES = 8
ITEMSIZE = {"fp32": 4, "bf16": 2}
# A chunk of the loss or the MLP: logits, or gate and up, of this size, but so many tokens at least:
# with fewer, a matrix product spends its time on fetching the weight.
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
        return model.hidden_size * (width + 3 * model.ffn_hidden_size + 2) + self.layer_biases

    @property
    def layer_biases(self) -> int:
        """Elements of one layer's biases: of its queries, keys and values, where it has them."""
        model = self.config.model
        return self.head_dim * (model.nheads + 2 * self.nheads_kv) if model.qkv_bias else 0

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, adapters and padding of the vocabulary included."""
        model = self.config.model
        tables = 1 if model.tied_embeddings else 2
        outside = (tables * self.padded_vocab_size + 1) * model.hidden_size
        extras = sum(map(self.learnable_extras, range(model.num_layers)))
        layer = self.layer_parameters + self.layer_adapters(1)
        return outside + model.num_layers * layer + extras

    def layer_adapters(self, tp_size: int) -> int:
        """Parameters of one layer's adapters on a rank of `tp_size`."""
        return sum(adapter_tensors(self.config, tp_size).values())

    @property
    def trained_parameters(self) -> int:
        """Parameters of the whole model that are trained: with LoRA not all."""
        model, lora = self.config.model, self.config.lora
        if not lora.rank:
            return self.num_parameters
        tables = lora.embeddings + (lora.head and not model.tied_embeddings)
        norms = lora.norms * (2 * model.num_layers + 1)
        extras = sum(map(self.learnable_extras, range(model.num_layers)))
        outside = (tables * self.padded_vocab_size + norms) * model.hidden_size
        return outside + model.num_layers * self.layer_adapters(1) + extras

    @property
    def stage_parameters(self) -> tuple[int, int]:
        """Parameters one rank holds on the (first, last) pipeline stage; one stage is both."""
        model, tp_size = self.config.model, self.config.parallel.tp_size
        norms = 2 * model.hidden_size
        layer = (self.layer_parameters - norms) // tp_size + norms + self.layer_adapters(tp_size)
        return self._on_stages(layer, embeddings=True, head=True, norms=True)

    @property
    def stage_trained(self) -> tuple[int, int]:
        """Of `stage_parameters`, those that are trained and so have a gradient."""
        model, lora = self.config.model, self.config.lora
        if not lora.rank:
            return self.stage_parameters
        layer = self.layer_adapters(self.config.parallel.tp_size)
        layer += lora.norms * 2 * model.hidden_size
        return self._on_stages(layer, lora.embeddings, lora.head, lora.norms)

    def _on_stages(self, layer: int, embeddings: bool, head: bool, norms: bool) -> tuple[int, int]:
        """Of `layer` parameters a layer with its extras, and of what is asked for beside layers."""
        model, parallel = self.config.model, self.config.parallel
        first, last = (
            sum(layer + self.learnable_extras(n) // parallel.tp_size for n in stage)
            for stage in (self.stage_layers[0], self.stage_layers[-1])
        )
        table = self.padded_vocab_size // parallel.tp_size * model.hidden_size
        # With tied embeddings the head is the embedding, of which the last stage has a copy.
        output = embeddings if model.tied_embeddings else head
        last += norms * model.hidden_size
        if parallel.pp_size == 1:
            whole = last + (embeddings + (output and not model.tied_embeddings)) * table
            return whole, whole
        return first + embeddings * table, last + output * table

    @property
    def state_bytes(self) -> int:
        """Weights, fp32 gradients and this rank's part of AdamW's fp32 state, on the fullest rank.

        The optimizer shares out whole tensors, so its part is taken as an even share, or as the
        largest tensor where that is more; the fullest rank holds at most both together.
        """
        parallel, trained = self.config.parallel, max(self.stage_trained)
        share = max(-(-trained // (self.dp_size * parallel.cp_size)), self._largest_trained)
        master = FP32_BYTES if self.itemsize < FP32_BYTES else 0
        held = max(
            weights * self.itemsize + gradients * FP32_BYTES
            for weights, gradients in zip(self.stage_parameters, self.stage_trained, strict=True)
        )
        return held + share * (2 * FP32_BYTES + master)

    @property
    def _largest_trained(self) -> int:
        """Elements of the largest trained tensor on a rank."""
        model, lora, tp_size = self.config.model, self.config.lora, self.config.parallel.tp_size
        rows = self.padded_vocab_size
        if not lora.rank:
            rows = max(rows, 2 * model.ffn_hidden_size)
        elif not (lora.embeddings or lora.head):
            return max(adapter_tensors(self.config, tp_size).values())
        return rows // tp_size * model.hidden_size

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint, all ranks' files together: weights and AdamW's state."""
        master = FP32_BYTES if self.itemsize < FP32_BYTES else 0
        states = self.trained_parameters * (2 * FP32_BYTES + master)
        return self.num_parameters * self.itemsize + states
