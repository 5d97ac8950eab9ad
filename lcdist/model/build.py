"""Build Megatron's GPTModel with our norm, layers and attention in its module slots."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.config.schema import Config
from lcdist.layout.documents import DocumentLayout
from lcdist.model.core_attention import LongContextAttention
from lcdist.model.embedding import Embedding
from lcdist.model.gradient import claim
from lcdist.model.init import init_weights
from lcdist.model.linear import Column, Row
from lcdist.model.lora import freeze, with_adapters
from lcdist.model.memory.layer import Layer, MemoryPolicy
from lcdist.model.memory.offload import CpuOffload
from lcdist.model.norm import HeadNorm, RMSNorm
from lcdist.model.output_loss import VocabShard, output_losses
from lcdist.model.rotary import rotary_by_length
from lcdist.model.self_attention import LongContextSelfAttention
from lcdist.model.transformer_config import transformer_config
from lcdist.plan import Plan
from lcdist_kernels import Rotary
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class CausalLM(GPTModel):
    """GPTModel whose loss leaves out the padding of the vocabulary.

    true_vocab_size: tokens in the vocabulary, without padding.
    document_layout: positions of text and landmarks that the attention of its layers needs.
    rotary: returns the rotation for a sequence length in tokens.
    loss_chunk: returns, for a number of tokens on this rank, how many of them get logits at once
        in the loss; None for all of them, kept until backward.
    """

    true_vocab_size: int
    document_layout: DocumentLayout
    rotary: Callable[[int], Rotary]
    loss_chunk: Callable[[int], int | None]

    def _postprocess(
        self, hidden_states: Tensor, *, labels: Tensor | None = None, **rest: Any
    ) -> Tensor:
        """Return losses or logits from hidden states `[s, b, h]`: Megatron's step after the layers.

        Remove this override once megatron-core accepts an output layer that contains the loss.
        """
        sequence = rest.get("packed_seq_params")
        if self.post_process and labels is not None:
            return self._losses(hidden_states, labels)
        if self.post_process and sequence is not None and sequence.cache is not None:
            # Decoding needs the last token's logits alone; those of a whole prompt would be the
            # largest tensor in memory.
            hidden_states = hidden_states[-1:]
        return super()._postprocess(hidden_states, labels=labels, **rest)

    def _losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        assert weight is not None
        group = self.pg_collection.tp
        shard = VocabShard(
            first=group.rank() * len(weight),
            num_tokens=vocab_rows(self.true_vocab_size, len(weight), group.rank()),
            group=group if group.size() > 1 else None,
            sequence_parallel=self.config.sequence_parallel,
        )
        chunk = self.loss_chunk(labels.numel())
        return output_losses(hidden, weight, labels.t(), shard, chunk).t()

    def gather_logits(self, logits: Tensor) -> Tensor:
        """Return logits `[..., vocab]` from this rank's `[..., vocab / tp]`; -inf for padding."""
        logits = hide_padding(logits, self.true_vocab_size, self.pg_collection.tp.rank())
        return tensor_parallel.gather_from_tensor_model_parallel_region(logits)


def hide_padding(logits: Tensor, vocab_size: int, tp_rank: int) -> Tensor:
    """Return logits `[..., vocab / tp]` with -inf in the columns that pad the vocabulary."""
    num_columns = logits.shape[-1]
    num_tokens = vocab_rows(vocab_size, num_columns, tp_rank)
    if num_tokens == num_columns:
        return logits
    padding = torch.arange(num_columns, device=logits.device) >= num_tokens
    return logits.masked_fill(padding, float("-inf"))


def vocab_rows(vocab_size: int, num_rows: int, tp_rank: int) -> int:
    """Return how many of a rank's `num_rows` output rows belong to a token; they come first."""
    return min(max(vocab_size - tp_rank * num_rows, 0), num_rows)


def build_model(plan: Plan, device: torch.device) -> list[CausalLM]:
    """Build and initialise this rank's model chunks: one, or vp_size with interleaving.

    The mesh must exist. A chunk maps (tokens, None, None, labels=labels,
    packed_seq_params=SequenceParams) to losses `[b, s_local]` on the last stage.
    """
    config = plan.config
    megatron = transformer_config(config, DTYPES[plan.dtype])
    core = ModuleSpec(
        module=LongContextAttention,
        params={
            "layers": plan.layers,
            "impl": config.attention.impl,
            "layout": plan.layout,
            "rotary": rotary_by_length(config.model.rope, plan.shape.head_dim),
        },
    )
    chunks = []
    for stage in range(config.parallel.vp_size):
        chunk = _chunk(plan, megatron, core, stage if config.parallel.vp_size > 1 else None)
        init_weights(chunk, megatron, config.train.seed, config.model.init_std)
        freeze(chunk, config.lora)
        chunk = chunk.to(device)
        _claim_weights(chunk)
        chunks.append(chunk)
    return chunks


def _claim_weights(chunk: CausalLM) -> None:
    """Mark the weights whose gradients `lcdist.model.gradient` sums."""
    for module in chunk.modules():
        kinds = ColumnParallelLinear, RowParallelLinear, Embedding
        if isinstance(module, kinds) and module.weight is not None:
            claim(module.weight)
    if chunk.share_embeddings_and_output_weights and chunk.pre_process and chunk.post_process:
        marks = vars(chunk.embedding.word_embeddings.weight)
        marks["is_tied_embedding"] = True
        # Megatron's mark, by which its hook would add the placeholder.
        marks["zero_out_wgrad"] = False


def _chunk(
    plan: Plan, megatron: TransformerConfig, core: ModuleSpec, vp_stage: int | None
) -> CausalLM:
    num_layers = get_num_layers_to_build(megatron, vp_stage)
    memory, store = plan.memory, CpuOffload() if plan.memory.offloads else None
    policies = [MemoryPolicy(memory.recompute, memory.mlp_chunk, store)] * num_layers
    if memory.mix is not None and memory.cheaper is not None:
        first = num_layers - memory.mix.layers
        cheaper = MemoryPolicy(memory.cheaper.recompute, memory.cheaper.mlp_chunk)
        policies[first:] = [cheaper] * memory.mix.layers
    spec = TransformerBlockSubmodules(
        layer_specs=[_layer_spec(core, policy, plan.config) for policy in policies],
        layer_norm=RMSNorm,  # pyright: ignore[reportArgumentType]
    )
    stage: dict[str, Any] = {"ignore_virtual": False, "vp_stage": vp_stage}
    model = CausalLM(
        config=megatron,
        transformer_layer_spec=spec,  # type: ignore[arg-type]
        vocab_size=plan.shape.padded_vocab_size,
        max_sequence_length=plan.shape.seqlen,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        share_embeddings_and_output_weights=plan.config.model.tied_embeddings,
        position_embedding_type="none",
        vp_stage=vp_stage,
    )
    if model.pre_process:
        # GPTModel has no slot for the class of its embedding.
        model.embedding.word_embeddings.__class__ = Embedding
    model.true_vocab_size = plan.config.model.vocab_size
    model.document_layout = plan.shape.document_layout
    model.rotary = core.params["rotary"]
    model.loss_chunk = plan.memory.loss_chunk
    return model


def _layer_spec(core: ModuleSpec, policy: MemoryPolicy, config: Config) -> ModuleSpec:
    lora = config.lora
    head_norm = HeadNorm if config.model.qk_norm else IdentityOp
    attention = ModuleSpec(
        module=LongContextSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=with_adapters(Column, lora, "q", "k", "v"),
            core_attention=core,
            linear_proj=with_adapters(Row, lora, "o"),
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(
            linear_fc1=with_adapters(Column, lora, "gate", "up"),
            linear_fc2=with_adapters(Row, lora, "down"),
        ),
    )
    return ModuleSpec(
        module=Layer,
        params={"policy": policy},
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
        ),
    )
