"""A layer that keeps for backward what `[train] recompute`, `mlp` and `offload` say.

Its steps are those of Megatron's TransformerLayer for a decoder's self-attention; what is kept of
them is decided here, as Megatron's own recomputation knows neither tiles nor the host's memory, and
trains nothing of a layer whose input asks for no gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.model.memory.offload import CpuOffload
from lcdist.model.memory.recompute import Cheap, recomputed, trained
from lcdist.model.memory.tiled_mlp import MLPBlock, sequence_tiled, swiglu
from lcdist.model.sequence import SequenceParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)


@dataclass(frozen=True)
class MemoryPolicy:
    """What the layers of a model chunk keep. recompute: "none", "selective" or "full".

    mlp_chunk: of how many tokens on this rank, how many go through the MLP at once; None: all.
    store: where full recompute keeps inputs, None: on the device.
    """

    recompute: str
    mlp_chunk: Callable[[int], int | None]
    store: CpuOffload | None = None


class Layer(TransformerLayer):
    """Megatron's layer: x `[s, b, h]` to y `[s, b, h]` and no context."""

    input_layernorm: Any
    pre_mlp_layernorm: Any
    mlp: Any

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *,
        keeping: MemoryPolicy,
        **words: Any,
    ) -> None:
        super().__init__(config, submodules, **words)
        self.keeping = keeping

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        packed_seq_params: SequenceParams | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """As Megatron calls it; masks and rotations are the attention's business."""
        kept = self.keeping.recompute if torch.is_grad_enabled() else "none"
        if kept == "full":
            store = self.keeping.store
            run = _TwiceRun(self, packed_seq_params)
            put = partial(store.put, self.layer_number) if store is not None else None
            return recomputed(run, hidden_states, trained(self), put), None
        if kept == "selective":
            cheap = Cheap()
            with cheap:
                return self.run(hidden_states, packed_seq_params, cheap), None
        return self.run(hidden_states, packed_seq_params), None

    def run(
        self,
        x: Tensor,
        sequence: SequenceParams | None,
        cheap: Cheap | None = None,
        unread: bool = False,
    ) -> Tensor:
        """The layer itself. cheap: forgets what it can; unread: as for `tiled`."""
        normed = _norm(self.input_layernorm, x, cheap)
        attended = self.self_attention(normed, attention_mask=None, packed_seq_params=sequence)
        del normed
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        x = add(attended, x, self.hidden_dropout)
        del attended
        half = MLPBlock(self.pre_mlp_layernorm, self.mlp)
        chunk = self.keeping.mlp_chunk(x.shape[0] * x.shape[1] * half.parts)
        if chunk is not None:
            return sequence_tiled(half, x, chunk, unread)
        normed = _norm(half.norm, x, cheap)
        out = self.mlp(normed) if cheap is None else self._mlp(normed, cheap)
        add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
        return add(out, x, self.hidden_dropout)

    def _mlp(self, x: Tensor, cheap: Cheap) -> tuple[Tensor, Tensor | None]:
        gate_up, bias = self.mlp.linear_fc1(x)
        assert bias is None
        return self.mlp.linear_fc2(cheap.made(swiglu(gate_up), swiglu, gate_up))


class _TwiceRun:
    """A layer's two runs under full recompute: nobody looks at what the second one returns."""

    def __init__(self, layer: Layer, sequence: SequenceParams | None) -> None:
        self.layer, self.sequence = layer, sequence

    def __call__(self, x: Tensor) -> Tensor:
        # Autograd runs a function's forward without gradients, and its backward's forward with.
        return self.layer.run(x, self.sequence, unread=torch.is_grad_enabled())


def _norm(norm: torch.nn.Module, x: Tensor, cheap: Cheap | None) -> Tensor:
    if cheap is None:
        return norm(x)
    return cheap.made(recomputed(norm, x, trained(norm)), norm, x)
