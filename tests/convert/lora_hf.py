"""Build transformers and PEFT models with our weights and adapters."""

from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lcdist.config.schema import Config

THEIRS = {
    **{"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
    **{"o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj"},
    "down": "mlp.down_proj",
}


def llama(config: Config, weights: dict[str, Tensor]) -> LlamaForCausalLM:
    """Return transformers' model with our weights, without adapters."""
    model, tied = config.model, config.model.tied_embeddings
    groups = model.nheads_kv or model.nheads
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.nheads,
            num_key_value_heads=groups,
            rms_norm_eps=model.norm_eps,
            tie_word_embeddings=tied,
        )
    )
    vocab = model.vocab_size
    state = {"model.embed_tokens.weight": weights["embedding.word_embeddings.weight"][:vocab]}
    state["model.norm.weight"] = weights["decoder.final_layernorm.weight"]
    head = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
    state["lm_head.weight"] = weights[head][:vocab]
    for i in range(model.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        for target, part in unfused(weights, ours, groups).items():
            state[f"{theirs}{THEIRS[target]}.weight"] = part
        state[f"{theirs}input_layernorm.weight"] = weights[f"{ours}input_layernorm.weight"]
        after = f"{theirs}post_attention_layernorm.weight"
        state[after] = weights[f"{ours}pre_mlp_layernorm.weight"]
    hf.load_state_dict({name: tensor.float().clone() for name, tensor in state.items()})
    return hf


def unfused(weights: dict[str, Tensor], ours: str, groups: int) -> dict[str, Tensor]:
    """Return the projections of one layer, by target."""
    qkv = weights[f"{ours}self_attention.linear_qkv.weight"]
    heads = qkv.view(groups, -1, 16, qkv.shape[1])
    gate, up = weights[f"{ours}mlp.linear_fc1.weight"].chunk(2)
    return {
        "q": heads[:, :-2].reshape(-1, qkv.shape[1]),
        "k": heads[:, -2].reshape(-1, qkv.shape[1]),
        "v": heads[:, -1].reshape(-1, qkv.shape[1]),
        "o": weights[f"{ours}self_attention.linear_proj.weight"],
        "gate": gate,
        "up": up,
        "down": weights[f"{ours}mlp.linear_fc2.weight"],
    }


def peft_llama(config: Config, weights: dict[str, Tensor]) -> PeftModel:
    """Return a PEFT model with our weights and adapters, and frozen base weights."""
    lora, whole = config.lora, []
    whole += ["embed_tokens"] * lora.embeddings + ["lm_head"] * lora.head
    whole += ["input_layernorm", "post_attention_layernorm", "model.norm"] * lora.norms
    names = [THEIRS[target].split(".")[1] for target in lora.targets]
    peft: Any = get_peft_model(
        llama(config, weights),
        PeftConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            target_modules=names,
            modules_to_save=whole or None,
            ensure_weight_tying=config.model.tied_embeddings and lora.embeddings,
        ),
    )
    with torch.no_grad():
        for name, tensor in factors(weights).items():
            peft.get_parameter(name).copy_(tensor)
    return peft


def factors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapters' factors among `tensors`, by PEFT's names."""
    found = {}
    for key, tensor in tensors.items():
        if ".lora." in key:
            layer, target, factor = key.split(".")[2], *key.split(".")[-2:]
            name = f"base_model.model.model.layers.{layer}.{THEIRS[target]}"
            found[f"{name}.lora_{factor}.default.weight"] = tensor
    return found
