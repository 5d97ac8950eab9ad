"""Sizes of LoRA adapters, for the whole model and on one tensor-parallel rank."""

from lcdist.config.lora import Target
from lcdist.config.schema import Config, ModelConfig

ATTENTION = ("q", "k", "v")
ROW_PARALLEL = ("o", "down")


def target_shapes(model: ModelConfig) -> dict[Target, tuple[int, int]]:
    """Return the (out, in) features of every projection that can have an adapter."""
    head_dim = model.head_dim or model.hidden_size // model.nheads
    hidden, ffn, q = model.hidden_size, model.ffn_hidden_size, model.nheads * head_dim
    kv = (model.nheads_kv or model.nheads) * head_dim
    return {
        "q": (q, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "o": (hidden, q),
        "gate": (ffn, hidden),
        "up": (ffn, hidden),
        "down": (hidden, ffn),
    }


def adapter_tensors(config: Config, tp_size: int = 1) -> dict[str, int]:
    """Return the elements of each factor ("q.A") of a layer's adapters on a rank of `tp_size`."""
    lora, model = config.lora, config.model
    sizes: dict[str, int] = {}
    for target in lora.targets if lora.rank else ():
        out_features, in_features = target_shapes(model)[target]
        if target in ROW_PARALLEL:
            in_features //= tp_size
        elif target not in ATTENTION or (model.nheads_kv or model.nheads) % tp_size == 0:
            # With fewer key/value heads than ranks, every rank holds all of B.
            out_features //= tp_size
        sizes[f"{target}.A"] = lora.rank * in_features
        sizes[f"{target}.B"] = lora.rank * out_features
    return sizes
