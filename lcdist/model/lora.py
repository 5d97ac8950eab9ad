"""LoRA on Megatron's parallel linears (arXiv:2106.09685): Y = X W^T + alpha/r (X A^T) B^T.

Every target has its own A and B, as in PEFT, although Megatron fuses q, k and v into one weight
(interleaved by groups) and gate and up into another. PEFT's layers for Megatron (PEFT 0.21) put one
A and one B on a whole fused weight. They cannot leave out k and do not load on Hugging Face's
q_proj, k_proj and v_proj; they support fp32 only; and under sequence parallelism the gradient of a
replicated factor is not summed over ranks. Maths and file format are therefore PEFT's, the layers
are ours.

Besides the base layer's messages, tensor-parallel ranks exchange only X A^T, r features wide:

    column-parallel   A replicated, B sharded by rows.    forward: gather (sequence parallelism)
                                                          backward: one sum for all targets
    row-parallel      A sharded by columns, B replicated. forward: sum

Gradients of sharded factors need no reduction. Gradients of replicated factors are equal on all
ranks; under sequence parallelism they are sums over a rank's tokens, which Megatron reduces as for
norms. With fewer key/value heads than ranks, a rank's rows of the fused weight are parts of q, k
and v. B is then replicated as well, and each rank uses its rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.config.lora import LoraConfig
from lcdist.model.gradient import summed_over_tp
from lcdist.model.init import (
    HEAD_NORMS,
    LORA_PARAMS,
    METHOD_PARAMS,
    VOCAB_TABLES,
    whole_model_names,
)
from lcdist.model.linear import Column, Row
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


def with_adapters(linear: type, lora: LoraConfig, *fused: str) -> Any:
    """Return the layer spec for `linear` with adapters for the targets `fused` in its weight.

    Returns `linear` itself if `lora` adapts none of them.
    """
    targets = tuple(target for target in fused if target in lora.targets)
    if not lora.rank or not targets:
        return linear
    module = {Column: LoraColumn, Row: LoraRow}[linear]
    return ModuleSpec(module=module, params={"lora": lora, "targets": targets})


def is_trained(name: str, lora: LoraConfig) -> bool:
    """Return whether a run with `lora` trains a parameter, by its whole-model name."""
    if not lora.rank or LORA_PARAMS in name or METHOD_PARAMS in name:
        return True
    return (
        (lora.embeddings and name == VOCAB_TABLES["embeddings"])
        or (lora.head and name == VOCAB_TABLES["head"])
        # PEFT's format has the layers' norms; those of heads stay as they are.
        or (lora.norms and name.endswith("layernorm.weight") and HEAD_NORMS not in name)
    )


def freeze(chunk: nn.Module, lora: LoraConfig) -> None:
    """Disable gradients of all parameters that `lora` does not train.

    Call it before Megatron allocates gradient buffers.
    """
    names = whole_model_names(chunk)
    for local, parameter in chunk.named_parameters():
        parameter.requires_grad_(is_trained(names[local], lora))


class Adapter(nn.Module):
    """Both factors of one target on this rank: A `[rank, in]`, B `[out, rank]`, as `weight`."""

    def __init__(self, rank: int, columns: int, rows: int, weight: Tensor) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.A = nn.Parameter(torch.empty(rank, columns, **options))
        self.B = nn.Parameter(torch.empty(rows, rank, **options))


class _Adapted:
    """Declare attributes that Megatron annotates as optional and always sets."""

    config: Any
    tp_group: Any
    weight: Any
    lora: Any


class LoraColumn(_Adapted, Column):
    """Megatron's column-parallel linear with adapters for some targets of its fused weight.

    shards_b: whether each rank holds the B rows of its own weight rows; otherwise B is replicated.
    """

    def __init__(
        self, *sizes: int, lora: LoraConfig, targets: Sequence[str], **kwargs: Any
    ) -> None:
        super().__init__(*sizes, **kwargs)
        self.scale = lora.scale
        rows_by_target = _target_rows(self.config, bool({"q", "k", "v"} & set(targets)))
        local = _local_rows(self.output_size, kwargs.get("stride", 1), self.tp_group)
        groups, tp_size = self.config.num_query_groups or 1, self.tp_group.size()
        self.shards_b = "gate" in rows_by_target or groups % tp_size == 0
        self.lora = nn.ModuleDict()
        for target in targets:
            rows = rows_by_target[target]
            weight_rows, b_rows = _matching_rows(rows, local)
            count = len(b_rows) if self.shards_b else len(rows)
            self.lora[target] = Adapter(lora.rank, self.input_size, count, self.weight)
            A, B = self.lora[target].A, self.lora[target].B
            vars(A)["sequence_parallel"] = self.sequence_parallel
            if self.shards_b:
                set_tensor_model_parallel_attributes(B, True, 0, 1)
            self.register_buffer(f"{target}_weight_rows", weight_rows, persistent=False)
            self.register_buffer(f"{target}_b_rows", b_rows, persistent=False)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return Megatron's output with the adapters' added, and its bias.

        input_: `[s, b, in]`; this rank's tokens alone under sequence parallelism.
        """
        out, bias = super().forward(input_, *args, **kwargs)
        down = _down_projection(
            input_, torch.cat([summed_over_tp(adapter.A) for adapter in self.lora.values()])
        )
        if self.sequence_parallel:
            down = gather_from_sequence_parallel_region(down, group=self.tp_group)
        elif self.tp_group.size() > 1:
            down = copy_to_tensor_model_parallel_region(down, group=self.tp_group)
        return _AddProduct.apply(out, down, self._fused_b(), self.scale), bias

    def _fused_b(self) -> Tensor:
        """Return all B as one matrix `[out / tp, targets * rank]`.

        Each B fills its target's rows and columns; the rest is 0.
        """
        blocks = []
        for target, adapter in self.lora.items():
            B = adapter.B
            if not self.shards_b:
                # Backward sums over the ranks the gradients of the rows that each has used.
                B = copy_to_tensor_model_parallel_region(B, group=self.tp_group)
                B = B.index_select(0, getattr(self, f"{target}_b_rows"))
            block = B.new_zeros(len(self.weight), B.shape[1])
            blocks.append(block.index_copy(0, getattr(self, f"{target}_weight_rows"), B))
        return torch.cat(blocks, 1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As in Megatron; factors are saved unsharded under a mesh-independent name."""
        axes = {f"lora.{target}.B": 0 for target in self.lora if self.shards_b}
        axes |= {"weight": 0, "bias": 0}
        return _sharded(self, axes, prefix, sharded_offsets, metadata)


class LoraRow(_Adapted, Row):
    """Megatron's row-parallel linear with an adapter for its one target."""

    def __init__(
        self, *sizes: int, lora: LoraConfig, targets: Sequence[str], **kwargs: Any
    ) -> None:
        super().__init__(*sizes, **kwargs)
        self.scale = lora.scale
        [self.target] = targets
        adapter = Adapter(lora.rank, self.input_size_per_partition, self.output_size, self.weight)
        set_tensor_model_parallel_attributes(adapter.A, True, 1, 1)
        vars(adapter.B)["sequence_parallel"] = self.sequence_parallel
        self.lora = nn.ModuleDict({self.target: adapter})

    def forward(self, input_: Tensor) -> Any:
        """Return Megatron's output with the adapter's added, and its bias.

        input_: `[s, b, in / tp]`.
        """
        out, bias = super().forward(input_)
        adapter = self.lora[self.target]
        down = _down_projection(input_, adapter.A)
        if self.sequence_parallel:
            down = reduce_scatter_to_sequence_parallel_region(down, group=self.tp_group)
        else:
            down = reduce_from_tensor_model_parallel_region(down, group=self.tp_group)
        B = summed_over_tp(adapter.B)
        total = torch.addmm(out.flatten(0, -2), down.flatten(0, -2), B.t(), alpha=self.scale)
        return total.view(out.shape), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As in Megatron; both factors are saved unsharded under a mesh-independent name."""
        axes = {"weight": 1, f"lora.{self.target}.A": 1}
        return _sharded(self, axes, prefix, sharded_offsets, metadata)


class _AddProduct(Function):
    """Add scale down B^T to out in place: nobody else needs the base layer's own output.

    As an operation on a view of out, backward would copy the gradient of out, and copy it back.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, down: Tensor, B: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(down, B)
        ctx.mark_dirty(out)
        out.flatten(0, -2).addmm_(down.flatten(0, -2), B.t(), alpha=scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        [dout], (down, B) = grads, ctx.saved_tensors
        rows = dout.flatten(0, -2)
        ddown = (rows @ B).mul_(ctx.scale).view(down.shape) if ctx.needs_input_grad[1] else None
        dB = None
        if ctx.needs_input_grad[2]:
            dB = (rows.t() @ down.flatten(0, -2)).mul_(ctx.scale)
        return dout, ddown, dB, None


def _down_projection(x: Tensor, A: Tensor) -> Tensor:
    """Return x A^T `[s, b, r]`, with the same bits whether or not gradients are enabled.

    Recomputation needs that. F.linear uses another matrix product for three dimensions when
    gradients are disabled.
    """
    return torch.mm(x.flatten(0, -2), A.t()).view(*x.shape[:-1], len(A))


def _target_rows(config: TransformerConfig, is_attention: bool) -> dict[str, Tensor]:
    """Return each target's row numbers in the unsharded fused weight, in the target's order."""
    if not is_attention:
        gate, up = torch.arange(2 * config.ffn_hidden_size).view(2, -1)  # type: ignore[operator]
        return {"gate": gate, "up": up}
    groups: Any = config.num_query_groups
    group_size = config.num_attention_heads // groups
    rows = torch.arange(groups * (group_size + 2) * config.kv_channels)  # type: ignore[operator]
    rows = rows.view(groups, group_size + 2, -1)
    q, k, v = rows.split([group_size, 1, 1], 1)
    return {"q": q.reshape(-1), "k": k.reshape(-1), "v": v.reshape(-1)}


def _local_rows(count: int, stride: int, group: Any) -> Tensor:
    """Return the numbers of this rank's rows in the unsharded weight, in this rank's order."""
    rows = torch.arange(count).view(stride, group.size(), -1)
    return rows[:, group.rank()].reshape(-1)


def _matching_rows(rows: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """Match a target's rows with this rank's rows; both are numbers in the unsharded weight.

    Returns (indices into `local`, indices into `rows`) of the common rows, in the order of `rows`.
    """
    local_index = {row: i for i, row in enumerate(local.tolist())}
    pairs = [(local_index[row], i) for i, row in enumerate(rows.tolist()) if row in local_index]
    in_local, in_rows = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).t().contiguous()
    return in_local, in_rows


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
