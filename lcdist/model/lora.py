"""LoRA on Megatron's parallel linears (arXiv:2106.09685): Y = X W^T + alpha/r (X A^T) B^T.

Every target has an A and a B of its own, as PEFT has, though Megatron keeps q, k and v in one
weight (interleaved by groups) and gate and up in another. PEFT's own layers for Megatron (its 0.21)
put one A and one B on a whole fused weight, so they can neither leave k out nor be loaded on
Hugging Face's q_proj, k_proj and v_proj; they are fp32 alone, and a replicated factor's gradient is
not summed over ranks under sequence parallelism. So maths and file format are PEFT's, the layers
ours.

Only X A^T, r wide, travels between tensor-parallel ranks beside what the base layer sends:

    column-parallel   A whole, B cut by rows.    forward: gathered under sequence parallelism;
                                                 backward: summed over ranks, once for all targets
    row-parallel      A cut by columns, B whole. forward: summed over ranks

so gradients of cut parameters are whole, and those of whole ones are the same on every rank, or
sums over a rank's tokens under sequence parallelism, which Megatron adds up as it does for norms.
With fewer key/value heads than ranks a rank's rows of the fused weight are some of q, of k and of
v: then B is whole as well, and each rank uses the rows it has.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.config.lora import LoraConfig
from lcdist.model.init import EXTRAS, LORA, TABLES, whole_model_names
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


def adapted(linear: type, lora: LoraConfig, *fused: str) -> Any:
    """What a layer's spec says in the place of `linear`, whose weight the targets `fused` share."""
    targets = tuple(target for target in fused if target in lora.targets)
    if not lora.rank or not targets:
        return linear
    module = {ColumnParallelLinear: LoraColumn, RowParallelLinear: LoraRow}[linear]
    return ModuleSpec(module=module, params={"lora": lora, "targets": targets})


def is_trained(name: str, lora: LoraConfig) -> bool:
    """Whether a run with `lora` trains the parameter `name` of the whole model."""
    if not lora.rank or LORA in name or EXTRAS in name:
        return True
    return (
        (lora.embeddings and name == TABLES["embeddings"])
        or (lora.head and name == TABLES["head"])
        or (lora.norms and name.endswith("layernorm.weight"))
    )


def freeze(chunk: nn.Module, lora: LoraConfig) -> None:
    """Leave only what `lora` trains with a gradient; before Megatron makes its buffers for them."""
    names = whole_model_names(chunk)
    for local, parameter in chunk.named_parameters():
        parameter.requires_grad_(is_trained(names[local], lora))


class Adapter(nn.Module):
    """The two factors of one target on this rank: A `[rank, in]`, B `[out, rank]`."""

    def __init__(self, rank: int, columns: int, rows: int, like: Tensor) -> None:
        super().__init__()
        words: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.A = nn.Parameter(torch.empty(rank, columns, **words))
        self.B = nn.Parameter(torch.empty(rows, rank, **words))


class LoraColumn(ColumnParallelLinear):
    """Megatron's column-parallel linear with an adapter for some of the targets in its weight."""

    # Megatron's annotations allow what its constructor never leaves.
    config: Any
    tp_group: Any
    weight: Any
    lora: Any

    def __init__(self, *sizes: int, lora: LoraConfig, targets: Sequence[str], **words: Any) -> None:
        super().__init__(*sizes, **words)
        self.scale = lora.scale
        whole = _whole_rows(self.config, "q" in targets or "k" in targets or "v" in targets)
        local = _local_rows(self.output_size, words.get("stride", 1), self.tp_group)
        groups, tp_size = self.config.num_query_groups or 1, self.tp_group.size()
        self.cuts = "gate" in whole or groups % tp_size == 0
        self.lora = nn.ModuleDict()
        for target in targets:
            rows = whole[target]
            place, taken = _meet(rows, local)
            count = len(taken) if self.cuts else len(rows)
            self.lora[target] = Adapter(lora.rank, self.input_size, count, self.weight)
            A, B = self.lora[target].A, self.lora[target].B
            vars(A)["sequence_parallel"] = self.sequence_parallel
            if self.cuts:
                set_tensor_model_parallel_attributes(B, True, 0, 1)
            self.register_buffer(f"{target}_place", place, persistent=False)
            self.register_buffer(f"{target}_taken", taken, persistent=False)

    def forward(self, input_: Tensor, *args: Any, **words: Any) -> Any:
        """input_ `[s, b, in]`, this rank's tokens under sequence parallelism; out as Megatron's."""
        out, bias = super().forward(input_, *args, **words)
        low = _low(input_, torch.cat([adapter.A for adapter in self.lora.values()]))
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=self.tp_group)
        elif self.tp_group.size() > 1:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        return _add_product(out, low, self._rows_of_b(), self.scale), bias

    def _rows_of_b(self) -> Tensor:
        """`[out / tp, targets * rank]`: every B in its target's rows and columns, 0 elsewhere."""
        blocks = []
        for target, adapter in self.lora.items():
            B = adapter.B
            if not self.cuts:
                # Backward adds up the rows that every rank has used.
                B = copy_to_tensor_model_parallel_region(B, group=self.tp_group)
                B = B.index_select(0, getattr(self, f"{target}_taken"))
            block = B.new_zeros(len(self.weight), B.shape[1])
            blocks.append(block.index_copy(0, getattr(self, f"{target}_place"), B))
        return torch.cat(blocks, 1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's, and every factor whole under one name on any mesh."""
        axes = {f"lora.{target}.B": 0 for target in self.lora if self.cuts}
        axes |= {"weight": 0, "bias": 0}
        return _sharded(self, axes, prefix, sharded_offsets, metadata)


class LoraRow(RowParallelLinear):
    """Megatron's row-parallel linear with an adapter for its one target."""

    weight: Any
    lora: Any

    def __init__(self, *sizes: int, lora: LoraConfig, targets: Sequence[str], **words: Any) -> None:
        super().__init__(*sizes, **words)
        self.scale = lora.scale
        [self.target] = targets
        adapter = Adapter(lora.rank, self.input_size_per_partition, self.output_size, self.weight)
        set_tensor_model_parallel_attributes(adapter.A, True, 1, 1)
        vars(adapter.B)["sequence_parallel"] = self.sequence_parallel
        self.lora = nn.ModuleDict({self.target: adapter})

    def forward(self, input_: Tensor) -> Any:
        """input_ `[s, b, in / tp]`; out as Megatron's."""
        out, bias = super().forward(input_)
        adapter = self.lora[self.target]
        low = _low(input_, adapter.A)
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return _add_product(out, low, adapter.B, self.scale), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's, and both factors whole under one name on any mesh."""
        axes = {"weight": 1, f"lora.{self.target}.A": 1}
        return _sharded(self, axes, prefix, sharded_offsets, metadata)


def _low(x: Tensor, A: Tensor) -> Tensor:
    """x A^T `[s, b, r]`, the same bits with gradients and without, as recomputation has it.

    F.linear takes another matrix product for three dimensions where no gradient is asked for.
    """
    return torch.mm(x.flatten(0, -2), A.t()).view(*x.shape[:-1], len(A))


def _add_product(out: Tensor, low: Tensor, B: Tensor, scale: float) -> Tensor:
    """out + scale low B^T without a tensor for the product."""
    total = torch.addmm(out.flatten(0, -2), low.flatten(0, -2), B.t(), alpha=scale)
    return total.view(out.shape)


def _whole_rows(config: TransformerConfig, attention: bool) -> dict[str, Tensor]:
    """By target, the numbers of its rows in the whole fused weight, in the target's own order."""
    if not attention:
        gate, up = torch.arange(2 * config.ffn_hidden_size).view(2, -1)  # type: ignore[operator]
        return {"gate": gate, "up": up}
    groups: Any = config.num_query_groups
    each = config.num_attention_heads // groups
    heads = torch.arange(groups * (each + 2) * config.kv_channels)  # type: ignore[operator]
    heads = heads.view(groups, each + 2, -1)
    q, k, v = heads.split([each, 1, 1], 1)
    return {"q": q.reshape(-1), "k": k.reshape(-1), "v": v.reshape(-1)}


def _local_rows(count: int, stride: int, group: Any) -> Tensor:
    """The numbers in the whole weight of this rank's rows, in their order here."""
    rows = torch.arange(count).view(stride, group.size(), -1)
    return rows[:, group.rank()].reshape(-1)


def _meet(rows: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """(where here the rows that a target has here are, which of the target's rows they are)."""
    where = {row: place for place, row in enumerate(local.tolist())}
    found = [(where[row], i) for i, row in enumerate(rows.tolist()) if row in where]
    places, taken = torch.tensor(found, dtype=torch.int64).view(-1, 2).t().contiguous()
    return places, taken


def _sharded(
    module: Any, axes: dict[str, int], prefix: str, offsets: tuple, metadata: dict | None
) -> dict[str, Any]:
    state = module.state_dict(prefix="", keep_vars=True)
    return make_sharded_tensors_for_checkpoint(
        state,
        prefix,
        axes,
        offsets,
        tp_group=module.tp_group,
        dp_cp_group=(metadata or {})["dp_cp_group"],
    )
