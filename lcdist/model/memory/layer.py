"""Transformer layer that saves activations as `[train] recompute`, `mlp` and `offload` say.

It computes what Megatron's TransformerLayer does for a decoder's self-attention. Megatron's own
recomputation supports neither tiles nor CPU offload, and it trains no parameter of a layer whose
input does not require a gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.model.linear import Row
from lcdist.model.memory.offload import CpuOffload
from lcdist.model.memory.recompute import SelectiveRecompute, recomputed, trained
from lcdist.model.memory.tiled_mlp import MLPBlock, sequence_tiled
from lcdist.model.norm import RMSNorm
from lcdist.model.sequence import SequenceParams
from lcdist_kernels.swiglu import swiglu
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)


@dataclass(frozen=True)
class MemoryPolicy:
    """Policy of a model chunk's layers for saving activations for backward.

    recompute: "none", "selective", "keep_attention" or "full".
    mlp_chunk: returns, for a number of tokens on this rank, how many of them go through the MLP at
        once; None for all of them.
    store: where the last two save layer inputs, and what attention keeps; None: on the device.
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
        policy: MemoryPolicy,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, **kwargs)
        # The residual is added without dropout.
        assert config.hidden_dropout == 0
        self.policy = policy

    def __call__(
        self,
        hidden_states: Tensor,
        packed_seq_params: SequenceParams | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Run the layer with its hooks, some of which look at positional arguments alone.

        Megatron calls it with keywords.
        """
        return super().__call__(hidden_states, packed_seq_params)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        packed_seq_params: SequenceParams | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Run the layer as Megatron calls it; attention handles masks and rotation itself."""
        recompute = self.policy.recompute if torch.is_grad_enabled() else "none"
        if recompute in ("full", "keep_attention"):
            store = self.policy.store
            run = _FullRecompute(self, packed_seq_params)
            put = partial(store.put, self.layer_number) if store is not None else None
            keep = recompute == "keep_attention"
            return recomputed(run, hidden_states, trained(self), put, keep), None
        if recompute == "selective":
            saved = SelectiveRecompute()
            with saved:
                return self.run(hidden_states, packed_seq_params, saved), None
        return self.run(hidden_states, packed_seq_params), None

    def run(
        self,
        x: Tensor,
        sequence: SequenceParams | None,
        selective: SelectiveRecompute | None = None,
        skip_output: bool = False,
    ) -> Tensor:
        """Compute the layer's output.

        Args:
            x: `[s, b, h]`.
            sequence: per-batch attention inputs.
            selective: recomputes cheap activations in backward; None: all are saved.
            skip_output: as for `sequence_tiled`.
        """
        x, normed = _add_norm(self.input_layernorm, x, None, selective)
        attended, bias = self.self_attention(
            normed, attention_mask=None, packed_seq_params=sequence
        )
        assert bias is None
        del normed
        block = MLPBlock(self.pre_mlp_layernorm, self.mlp)
        tokens = x.shape[0] * x.shape[1] * block.parts
        chunk = self.policy.mlp_chunk(tokens)
        if chunk is None and skip_output:
            # One tile, which does not multiply by fc2 again.
            chunk = tokens
        if chunk is not None:
            x = x + attended
            del attended
            return sequence_tiled(block, x, chunk, skip_output)
        x, normed = _add_norm(self.pre_mlp_layernorm, x, attended, selective)
        del attended
        return x + self._mlp(normed, selective)

    def _mlp(self, x: Tensor, selective: SelectiveRecompute | None) -> Tensor:
        gate_up, bias = self.mlp.linear_fc1(x)
        assert bias is None
        fc2 = self.mlp.linear_fc2
        makes_z_again = selective is not None and type(fc2) is Row and fc2.weight.requires_grad
        z = gate_up if makes_z_again else swiglu(gate_up)
        if selective is not None and not makes_z_again:
            # Backward of an adapter makes z again before that of swiglu overwrites gate_up.
            selective.register(z, swiglu, gate_up)
        out, bias = fc2(z)
        assert bias is None
        return out


class _FullRecompute:
    """Wrap a layer for full recompute; the output of the second forward pass is discarded."""

    def __init__(self, layer: Layer, sequence: SequenceParams | None) -> None:
        self.layer, self.sequence = layer, sequence

    def __call__(self, x: Tensor) -> Tensor:
        # Autograd disables gradients in the first forward; `recomputed` enables them in the second.
        return self.layer.run(x, self.sequence, skip_output=torch.is_grad_enabled())


def _add_norm(
    norm: RMSNorm, x: Tensor, delta: Tensor | None, selective: SelectiveRecompute | None
) -> tuple[Tensor, Tensor]:
    """Return x + delta, or x itself, and its norm, which `selective` makes again in backward."""
    total, normed, rstd = norm.add(x, delta)
    if selective is not None:
        selective.register(normed, partial(norm.scale, rstd=rstd), total)
    return total, normed
