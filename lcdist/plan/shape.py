"""Resolved facts of a run that memory, compute and traffic estimates are computed from."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm

from lcdist.attention import HeadSlice, Shape
from lcdist.config.schema import Config
from lcdist.layout import ContextLayout
from lcdist.layout.documents import DocumentLayout
from lcdist.plan.resolve import LayerAttention, document_layout_for

VOCAB_MULTIPLE = 128
ITEMSIZE = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class RunShape:
    """A configuration resolved on a mesh, and the sizes that follow directly from it.

    Attributes:
        config: As given.
        dp_size: Data-parallel ranks.
        layers: Attention of every layer.
        layout: How a sample is cut over context-parallel ranks.
        dtype: Of the weights, "fp32" or "bf16".
    """

    config: Config
    dp_size: int
    layers: tuple[LayerAttention, ...]
    layout: ContextLayout
    dtype: str

    @property
    def seqlen(self) -> int:
        """Tokens of a sample in the model: `train.seqlen` padded so that the layout cuts it."""
        return self.layout.seqlen

    @property
    def num_micro_batches(self) -> int:
        """Forward and backward passes a step on each data-parallel rank."""
        train = self.config.train
        return train.global_batch_size // (train.micro_batch_size * self.dp_size)

    @property
    def local_tokens(self) -> int:
        """Tokens of one micro-batch on a rank."""
        return self.config.train.micro_batch_size * self.layout.local_seqlen

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
        """Rows of the embedding: the vocabulary rounded up. The loss ignores the padding."""
        step = lcm(VOCAB_MULTIPLE, self.config.parallel.tp_size)
        return -(-self.config.model.vocab_size // step) * step

    @property
    def document_layout(self) -> DocumentLayout:
        """Return how the loader places documents in a row for the attention of these layers."""
        return document_layout_for(self.layers, self.config.model.vocab_size)

    @property
    def text_vocab_size(self) -> int:
        """Tokens that text can have: the model's vocabulary without the landmark."""
        return self.config.model.vocab_size - (self.document_layout.landmark is not None)

    @property
    def attention_name(self) -> str:
        """Name of the attention method; with several, each with its number of layers."""
        counts = Counter(layer.method.name for layer in self.layers)
        if len(counts) == 1:
            return self.layers[0].method.name
        return ", ".join(f"{count} x {name}" for name, count in counts.items())

    @property
    def chunk_layers(self) -> int:
        """Layers of one model chunk; a pipeline stage has `parallel.vp_size` chunks."""
        parallel = self.config.parallel
        return self.config.model.num_layers // (parallel.pp_size * parallel.vp_size)

    @cached_property
    def stage_layers(self) -> tuple[tuple[int, ...], ...]:
        """Layer numbers, from 0, of each pipeline stage."""
        parallel, chunk = self.config.parallel, self.chunk_layers
        # Interleaving deals chunks out to the stages in turn.
        firsts = [
            [(turn * parallel.pp_size + stage) * chunk for turn in range(parallel.vp_size)]
            for stage in range(parallel.pp_size)
        ]
        return tuple(tuple(first + i for first in stage for i in range(chunk)) for stage in firsts)

    def attention_shape(self, batch: int, tp_rank: int | None = None) -> Shape:
        """Return the attention's shape for `batch` samples on `tp_rank`; None: all heads."""
        nheads, tp_size = self.config.model.nheads, self.config.parallel.tp_size
        whole = Shape(
            batch, nheads, self.nheads_kv, self.head_dim, self.itemsize, seqlen=self.seqlen
        )
        if tp_rank is None:
            return whole
        first = tp_rank * (nheads // tp_size)
        return replace(
            whole,
            nheads=nheads // tp_size,
            nheads_kv=max(1, self.nheads_kv // tp_size),
            heads=HeadSlice(first, nheads, first * self.nheads_kv // nheads, self.nheads_kv),
        )
