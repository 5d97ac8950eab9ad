"""Self-attention of a layer: fused projection, attention method, output projection."""

from typing import Any

from torch import Tensor

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.model.core_attention import LongContextAttention
from lcdist.model.norm import HeadNorm
from lcdist.model.sequence import SequenceParams
from lcdist_kernels import Rotary
from lcdist_kernels.qkv import QkvShape, split_qkv
from megatron.core.transformer.attention import SelfAttention


class LongContextSelfAttention(SelfAttention):
    """Megatron's self-attention with q, k and v split and rotated in one pass.

    Megatron's own splits into views, which keep the projection's output alive until backward.
    """

    core_attention: LongContextAttention
    linear_qkv: Any
    q_layernorm: Any
    k_layernorm: Any

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: SequenceParams | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the layer's attention output `[s, b, h]` and the projection's bias.

        Args:
            hidden_states: `[s, b, h]`.
            attention_mask: must be None; masks follow from token positions.
            packed_seq_params: per-batch inputs; None: the training layout, without documents.
        """
        assert attention_mask is None
        core, sequence = self.core_attention, packed_seq_params or SequenceParams()
        if self.config.num_query_groups < self.world_size:  # type: ignore[operator]
            # Ranks share key heads: Megatron gathers a group's rows and takes this rank's queries.
            parts: Any = self.get_query_key_value_tensors(hidden_states)
            out = core(*(x.transpose(0, 1) for x in parts), sequence)
        else:
            # Norms come before the rotation, which is the method's own then.
            has_norms = isinstance(self.q_layernorm, HeadNorm)
            rotation = (None, None) if has_norms else core.rotation(sequence, hidden_states)
            q, k, v = self._split(hidden_states, *rotation)
            q, k = self.q_layernorm(q), self.k_layernorm(k)
            out = core(q, k, v, sequence, rotated=rotation[0] is not None)
        return self.linear_proj(out)

    def queries(self, hidden_states: Tensor) -> Tensor:
        """Return the queries `[b, s, h, d]` of hidden states `[s, b, h]`, without a rotation."""
        if self.config.num_query_groups < self.world_size:  # type: ignore[operator]
            parts: Any = self.get_query_key_value_tensors(hidden_states)
            return parts[0].transpose(0, 1)
        return self.q_layernorm(self._split(hidden_states)[0])

    def _split(
        self, hidden_states: Tensor, rotary: Rotary | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, of which q and k are rotated if a rotation is given."""
        mixed, _ = self.linear_qkv(hidden_states)
        nheads_kv = self.num_query_groups_per_partition
        group = self.num_attention_heads_per_partition // nheads_kv
        shape = QkvShape(nheads_kv, group, self.hidden_size_per_attention_head)
        return split_qkv(mixed, shape, rotary, positions, impl=self.core_attention.split_impl)
