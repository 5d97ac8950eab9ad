"""Translate our configuration into Megatron's TransformerConfig."""

import torch
import torch.nn.functional as F

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.config.schema import Config
from megatron.core.transformer import TransformerConfig


def _unchanged(weight: torch.Tensor) -> torch.Tensor:
    return weight


def transformer_config(config: Config, dtype: torch.dtype) -> TransformerConfig:
    """Return Megatron's configuration of the model and mesh of `config`, with `dtype` parameters.

    Every fusion that needs Transformer Engine, Apex or a run-time compiler is off. Initial values
    come from `init.py`.
    """
    model, parallel = config.model, config.parallel
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.nheads,
        num_query_groups=model.nheads_kv or model.nheads,
        kv_channels=model.head_dim or model.hidden_size // model.nheads,
        ffn_hidden_size=model.ffn_hidden_size,
        layernorm_epsilon=model.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        virtual_pipeline_model_parallel_size=parallel.vp_size if parallel.vp_size > 1 else None,
        context_parallel_size=parallel.cp_size,
        sequence_parallel=parallel.sequence_parallel,
        # Sum the loss over all tokens and divide once by their number (engines/loss.py).
        calculate_per_token_loss=True,
        # Megatron marks parameters as tensor-parallel only while it initialises them, so this stays
        # on; init.py sets the values afterwards.
        perform_initialization=True,
        init_method=_unchanged,
        output_layer_init_method=_unchanged,
        embedding_init_method=_unchanged,
        use_cpu_initialization=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        cross_entropy_loss_fusion=False,
        # Megatron frees tensors whose overlapped send is still in flight: gloo would send what the
        # memory holds next.
        deallocate_pipeline_outputs=parallel.vp_size == 1,
        # With two stages, interleaving sends activations and gradients to the same neighbour. In
        # one batch of point-to-point messages they would be swapped without an error.
        overlap_p2p_comm=parallel.vp_size > 1,
        batch_p2p_comm=parallel.vp_size == 1,
    )
