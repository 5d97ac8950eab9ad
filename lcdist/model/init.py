"""Initialise weights independently of the mesh: the same seed gives the same model everywhere.

Each parameter has a seed of its own, from (seed, whole-model name). On a CPU it is drawn whole and
then sharded for this rank. On a GPU every rank draws only its shard, by numbers that depend on the
seed and the element alone. A run on 64 ranks and a run on one rank start from the same weights, bit
for bit, so their loss curves can be compared. A run on GPUs and one on CPUs start from different
ones.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist_kernels.normal import Shard, normal_
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

# Part of the name of every parameter that an attention method learns beside the projections.
METHOD_PARAMS = ".core_attention.extras."
# Part of the name of every LoRA factor, before its target: `.lora.q.A`.
LORA_PARAMS = ".lora."
# Part of the names of the norms of queries and keys, and of no other norm's.
HEAD_NORMS = ".self_attention."
# Names of the two vocabulary tables by key of `[lora]`; tied embeddings have the first one alone.
VOCAB_TABLES = {"embeddings": "embedding.word_embeddings.weight", "head": "output_layer.weight"}


def init_weights(model: nn.Module, config: TransformerConfig, seed: int, std: float) -> None:
    """Fill the parameters of one model chunk in place.

    - Norms are 1, biases 0. Parameters of an attention method keep the values it gave them.
    - Projections that write to the residual stream are normal with deviation
      std / sqrt(2 num_layers) (GPT-2's rule); all other weights with deviation `std`.
    - LoRA's A is uniform within 1 / sqrt(in) (Kaiming with a = sqrt 5, as in PEFT), its B is 0.
    """
    tp_size = config.tensor_model_parallel_size
    tp_rank = _tp_rank(model)
    residual_std = std / math.sqrt(2 * config.num_layers)
    names = whole_model_names(model)
    with torch.no_grad():
        for local_name, parameter in model.named_parameters():
            name = names[local_name]
            if METHOD_PARAMS in name:
                continue
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            writes_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            deviation = residual_std if writes_residual else std
            parts = 2 if name.endswith("linear_fc1.weight") else 1  # gate and up
            dim = getattr(parameter, "partition_dim", -1)
            is_sharded = getattr(parameter, "tensor_model_parallel", False) and tp_size > 1
            if _draws_in_place(parameter) and LORA_PARAMS not in name:
                ranks = (tp_rank, tp_size) if is_sharded else (0, 1)
                shard = _position(parameter.shape, dim, parts, *ranks)
                normal_(parameter.detach(), shard, _seed(name, seed), deviation)
                continue
            shape = list(parameter.shape)
            if is_sharded:
                shape[dim] *= tp_size
            if LORA_PARAMS in name:
                whole = _draw_adapter(name, shape, seed)
            else:
                whole = _draw(name, shape, seed, deviation)
            parameter.copy_(_shard(whole, dim, parts, tp_rank, tp_size) if is_sharded else whole)


def _draws_in_place(parameter: Tensor) -> bool:
    """Return whether this rank draws its shard alone, on the device; a CPU's numbers are older."""
    return parameter.is_cuda


def _position(shape: Sequence[int], dim: int, parts: int, tp_rank: int, tp_size: int) -> Shard:
    """Return the position of this rank's shard `shape` of a matrix that is sharded along `dim`."""
    rows, columns = shape
    if dim == 1:
        return Shard(rows, rows, 0, columns * tp_size, columns * tp_rank)
    part = rows // parts
    return Shard(part, part * tp_size, part * tp_rank, columns)


def _draw(name: str, shape: list[int], seed: int, std: float) -> Tensor:
    return torch.randn(shape, generator=_generator(name, seed)) * std


def _draw_adapter(name: str, shape: list[int], seed: int) -> Tensor:
    if name.endswith(".B"):
        return torch.zeros(shape)
    return (2 * torch.rand(shape, generator=_generator(name, seed)) - 1) / math.sqrt(shape[1])


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(name, seed))


def _seed(name: str, seed: int) -> int:
    """Return the seed of a parameter, below 2^63."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _shard(whole: Tensor, dim: int, parts: int, tp_rank: int, tp_size: int) -> Tensor:
    """Return this rank's shard of each of the `parts` that are stacked along `dim`, stacked."""
    shards = [part.chunk(tp_size, dim)[tp_rank] for part in whole.chunk(parts, dim)]
    return torch.cat(shards, dim)


def _tp_rank(model: nn.Module) -> int:
    return model.pg_collection.tp.rank()  # type: ignore[union-attr,return-value]


def whole_model_names(model: nn.Module) -> dict[str, str]:
    """Map each local parameter name to its whole-model name.

    They differ in the layer number, which local names count within the pipeline stage. With tied
    embeddings the output layer has the name of the embedding.
    """
    prefixes = {
        f"{name}.": f"decoder.layers.{module.layer_number - 1}."
        for name, module in model.named_modules()
        if isinstance(module, TransformerLayer)
    }
    tied = getattr(model, "share_embeddings_and_output_weights", False)
    names = {}
    for name, _ in model.named_parameters():
        whole = name
        for local_prefix, prefix in prefixes.items():
            if name.startswith(local_prefix):
                whole = prefix + name.removeprefix(local_prefix)
        if tied and whole == "output_layer.weight":
            whole = VOCAB_TABLES["embeddings"]
        names[name] = whole
    return names
