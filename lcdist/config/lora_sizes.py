"""How large adapters are, of the whole model and on one tensor-parallel rank."""

from lcdist.config.lora import Target
from lcdist.config.schema import Config, ModelConfig

ATTENTION = ("q", "k", "v")
ROW_PARALLEL = ("o", "down")


def target_shapes(model: ModelConfig) -> dict[Target, tuple[int, int]]:
    """(out, in) features of every projection that an adapter can be put on."""
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
    """Elements of every factor ("q.A") of one layer's adapters, on a rank of `tp_size`."""
    lora, model = config.lora, config.model
    found = {}
    for target in lora.targets if lora.rank else ():
        out, into = target_shapes(model)[target]
        if target in ROW_PARALLEL:
            into //= tp_size
        elif target not in ATTENTION or (model.nheads_kv or model.nheads) % tp_size == 0:
            # With fewer key/value heads than ranks, B is whole on each.
            out //= tp_size
        found |= {f"{target}.A": lora.rank * into, f"{target}.B": lora.rank * out}
    return found
