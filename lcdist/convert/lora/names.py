"""Map the tensors of LoRA adapters between our names and PEFT's."""

from collections.abc import Mapping
from dataclasses import dataclass

from lcdist.config.lora import Target
from lcdist.config.lora_sizes import target_shapes
from lcdist.config.schema import Config
from lcdist.convert.huggingface.names import (
    EMBEDDING,
    FINAL_NORM,
    HF_EMBEDDING,
    HF_FINAL_NORM,
    HF_OUTPUT,
    OUTPUT,
    hf_prefix,
    layer_prefix,
)
from lcdist.model.init import LORA_PARAMS

PREFIX = "base_model.model."
# Module of each target in a layer: our name, Hugging Face's name.
MODULES: Mapping[Target, tuple[str, str]] = {
    "q": ("self_attention.linear_qkv", "self_attn.q_proj"),
    "k": ("self_attention.linear_qkv", "self_attn.k_proj"),
    "v": ("self_attention.linear_qkv", "self_attn.v_proj"),
    "o": ("self_attention.linear_proj", "self_attn.o_proj"),
    "gate": ("mlp.linear_fc1", "mlp.gate_proj"),
    "up": ("mlp.linear_fc1", "mlp.up_proj"),
    "down": ("mlp.linear_fc2", "mlp.down_proj"),
}
_NORMS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
}


@dataclass(frozen=True)
class AdapterTensor:
    """One tensor of an adapter under our name and PEFT's.

    Attributes:
        ours: name in a checkpoint.
        theirs: name in adapter_model.safetensors.
        shape: unsharded shape, without padding of the vocabulary.
        key: key of [lora] that trains the tensor.
    """

    ours: str
    theirs: str
    shape: tuple[int, ...]
    key: str


def factor_tensors(config: Config) -> list[AdapterTensor]:
    """Return the factors A and B of every adapter of `config`."""
    rank, tensors = config.lora.rank, []
    for layer in range(config.model.num_layers):
        for target in config.lora.targets:
            out_features, in_features = target_shapes(config.model)[target]
            ours, theirs = MODULES[target]
            ours = f"{layer_prefix(layer)}{ours}{LORA_PARAMS}{target}."
            theirs = f"{PREFIX}{hf_prefix(layer)}{theirs}.lora_"
            shape_a, shape_b = (rank, in_features), (out_features, rank)
            tensors.append(AdapterTensor(f"{ours}A", f"{theirs}A.weight", shape_a, "targets"))
            tensors.append(AdapterTensor(f"{ours}B", f"{theirs}B.weight", shape_b, "targets"))
    return tensors


def module_tensors(config: Config) -> list[AdapterTensor]:
    """Return the tensors that can be trained whole besides adapters, trained by `config` or not."""
    model = config.model
    hidden, table = (model.hidden_size,), (model.vocab_size, model.hidden_size)
    tensors = [AdapterTensor(EMBEDDING, PREFIX + HF_EMBEDDING, table, "embeddings")]
    for layer in range(model.num_layers):
        tensors += [
            AdapterTensor(
                layer_prefix(layer) + ours, f"{PREFIX}{hf_prefix(layer)}{theirs}", hidden, "norms"
            )
            for ours, theirs in _NORMS.items()
        ]
    tensors.append(AdapterTensor(FINAL_NORM, PREFIX + HF_FINAL_NORM, hidden, "norms"))
    # PEFT writes a tied output layer as a second copy of the embedding.
    ours, key = (EMBEDDING, "embeddings") if model.tied_embeddings else (OUTPUT, "head")
    tensors.append(AdapterTensor(ours, PREFIX + HF_OUTPUT, table, key))
    return tensors
