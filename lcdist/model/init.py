"""Initial values that do not depend on the mesh: the same seed is the same function everywhere.

Each parameter is drawn whole from a generator of its own, seeded by (seed, name of the parameter
in the whole model), and then cut for this rank. So a run on 64 ranks and a run on one start from
the same weights, bit for bit, and their loss curves can be compared.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

# In the name of every parameter that an attention method learns beside the projections.
EXTRAS = ".core_attention.extras."
# In the name of every factor of a LoRA adapter, before its target: `.lora.q.A`.
LORA = ".lora."
# The two tables of the vocabulary; with tied embeddings there is only the first.
TABLES = {"embeddings": "embedding.word_embeddings.weight", "head": "output_layer.weight"}


def initialise(model: nn.Module, config: TransformerConfig, seed: int, std: float) -> None:
    """Fill the parameters of one model chunk in place.

    Norms are 1; biases 0; learnable extras of the attention keep what they have; all other weights
    are normal with deviation `std`, the projections that write to the residual stream with
    std / sqrt(2 num_layers) (GPT-2's rule). Of an adapter, A is uniform up to 1 / sqrt(in)
    (Kaiming's with a = sqrt 5, as PEFT draws it) and B is 0.
    """
    tp_size = config.tensor_model_parallel_size
    tp_rank = _tp_rank(model)
    residual_std = std / math.sqrt(2 * config.num_layers)
    names = whole_model_names(model)
    with torch.no_grad():
        for local_name, parameter in model.named_parameters():
            name = names[local_name]
            if EXTRAS in name:
                continue  # the attention method gave their values
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            writes = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            is_gated = name.endswith("linear_fc1.weight")
            parts = 2 if is_gated else 1
            dim = getattr(parameter, "partition_dim", -1)
            cut = getattr(parameter, "tensor_model_parallel", False) and tp_size > 1
            shape = list(parameter.shape)
            if cut:
                shape[dim] *= tp_size
            if LORA in name:
                whole = _adapter(name, shape, seed)
            else:
                whole = _draw(name, shape, seed, residual_std if writes else std)
            parameter.copy_(_cut(whole, dim, parts, tp_rank, tp_size) if cut else whole)


def _draw(name: str, shape: list[int], seed: int, std: float) -> Tensor:
    return torch.randn(shape, generator=_generator(name, seed)) * std


def _adapter(name: str, shape: list[int], seed: int) -> Tensor:
    if name.endswith(".B"):
        return torch.zeros(shape)
    return (2 * torch.rand(shape, generator=_generator(name, seed)) - 1) / math.sqrt(shape[1])


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _cut(whole: Tensor, dim: int, parts: int, tp_rank: int, tp_size: int) -> Tensor:
    """This rank's piece of each of the `parts` (gate and up) that are stacked along `dim`."""
    pieces = [part.chunk(tp_size, dim)[tp_rank] for part in whole.chunk(parts, dim)]
    return torch.cat(pieces, dim)


def _tp_rank(model: nn.Module) -> int:
    return model.pg_collection.tp.rank()  # type: ignore[union-attr,return-value]


def whole_model_names(model: nn.Module) -> dict[str, str]:
    """By local name, the name with the layer's number in the whole model, not in this stage.

    The output layer of a model with tied embeddings is the embedding under another name.
    """
    numbers = {
        f"{name}.": f"decoder.layers.{module.layer_number - 1}."
        for name, module in model.named_modules()
        if isinstance(module, TransformerLayer)
    }
    tied = getattr(model, "share_embeddings_and_output_weights", False)
    names = {}
    for name, _ in model.named_parameters():
        whole = name
        for local, number in numbers.items():
            if name.startswith(local):
                whole = number + name.removeprefix(local)
        if tied and whole == "output_layer.weight":
            whole = TABLES["embeddings"]
        names[name] = whole
    return names
