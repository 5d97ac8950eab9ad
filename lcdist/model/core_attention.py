"""Core attention of Megatron's layers: calls the attention method of each layer.

Queries and keys come rotated where the method says that it takes them so; then the split of the
fused projection rotates them on the way (`self_attention.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.attention import HeadSlice
from lcdist.attention.context import rank_positions
from lcdist.exchange import group_rank
from lcdist.layout import ContextLayout
from lcdist.model.sequence import SequenceParams
from lcdist.plan.resolve import LayerAttention
from lcdist_kernels import Rotary
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class LongContextAttention(MegatronModule):
    """One layer's attention, exact under context and tensor parallelism.

    `extras` holds the parameters that a method learns beside the projections. They are sharded over
    tensor-parallel ranks by query heads, their last dim.

    Args:
        layers: method and options of every layer of the model, as the plan resolved them.
        impl: kernel implementation, as configured.
        layout: of the training sequences.
        rotary: returns the rotation for a sequence length in tokens.

    The other arguments are Megatron's.
    """

    def __init__(  # noqa: PLR0913
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        *,
        layers: Sequence[LayerAttention],
        impl: str,
        layout: ContextLayout,
        rotary: Callable[[int], Rotary],
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None
        # Megatron's layer numbers are those of the whole model, from 1, on every stage.
        layer = layers[layer_number - 1]
        self.method, self.options, self.impl = layer.method, layer.options, impl
        self.layout, self.rotary = layout, rotary
        self.layer_number, self.softmax_scale = layer_number, softmax_scale
        self.cp_group = pg_collection.cp if pg_collection.cp.size() > 1 else None
        nheads, tp = config.num_attention_heads, pg_collection.tp
        nheads_kv = config.num_query_groups or nheads
        self.heads = HeadSlice.of_rank(nheads, nheads_kv, tp.rank(), tp.size())
        self.extras = nn.ParameterDict(self._extras(config))

    def _extras(self, config: TransformerConfig) -> dict[str, nn.Parameter]:
        nheads, extras = config.num_attention_heads, {}
        first, count = self.heads.first, nheads // config.tensor_model_parallel_size
        for name, whole in self.method.initial(self.options, nheads).items():
            shard = whole[..., first : first + count].to(config.params_dtype)
            extras[name] = nn.Parameter(shard.clone())
            set_tensor_model_parallel_attributes(extras[name], True, whole.ndim - 1, 1)
        return extras

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As in Megatron; each of `extras` is saved under one name that is the same on any mesh."""
        state = self.state_dict(prefix="", keep_vars=True)
        axes = {f"extras.{name}": value.ndim - 1 for name, value in self.extras.items()}
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequence: SequenceParams,
        rotated: bool = False,
    ) -> Tensor:
        """Return the attention output `[s_local, b, nheads / tp * head_dim]`.

        Args:
            q: `[b, s_local, nheads / tp, head_dim]`.
            k: `[b, s_local, nheads_kv / tp, head_dim]`.
            v: as k.
            sequence: per-batch inputs.
            rotated: whether q and k are rotated already, as `rotation` said.
        """
        if sequence.cache is not None:
            out = sequence.cache.attend(self.layer_number, q, k, v)
        elif sequence.cu_seqlens is None:
            out = self._attend(q, k, v, sequence, None, rotated)
        else:
            # Document boundaries differ between rows, so each row is a call of its own.
            rows = [
                self._attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], sequence, table, rotated)
                for i, table in enumerate(sequence.cu_seqlens)
            ]
            out = torch.cat(rows)
        out = out.transpose(0, 1)  # [s_local, b, h, d]
        return out.reshape(out.shape[0], out.shape[1], -1)

    @property
    def split_impl(self) -> str:
        """`impl` of the split of the fused projection."""
        return "torch" if self.impl in ("torch", "reference") else "auto"

    def rotation(
        self, sequence: SequenceParams, like: Tensor
    ) -> tuple[Rotary | None, Tensor | None]:
        """Return the rotation of q and k before the call, and positions `[s]` or `[b, s]`.

        None, None where the method gets them as they are; a cache of decoding holds such keys.
        like: a tensor on the model's device.
        """
        if "rotated" not in self.method.supports or sequence.cache is not None:
            return None, None
        layout = sequence.layout or self.layout
        rank = group_rank(self.cp_group)
        positions = rank_positions(layout, rank, sequence.cu_seqlens, like.device)
        return self.rotary(sequence.seqlen or layout.seqlen), positions

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequence: SequenceParams,
        table: Tensor | None,
        rotated: bool,
    ) -> Tensor:
        layout = sequence.layout or self.layout
        return self.method.attention(
            q,
            k,
            v,
            options=self.options,
            layout=layout,
            group=self.cp_group,
            rotary=None if rotated else self.rotary(sequence.seqlen or layout.seqlen),
            cu_seqlens=table,
            softmax_scale=self.softmax_scale,
            params=dict(self.extras) or None,
            heads=self.heads,
            impl=self.impl,
        )
