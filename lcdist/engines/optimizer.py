"""Sharded AdamW: optimizer state divided over the ranks that hold the same parameters (ZeRO-1).

ZeRO stage 1 (arXiv:1910.02054) with whole tensors. Each parameter has one owner in the DP x CP
group. The owner keeps its moments (and its fp32 master for bf16 weights), updates it and broadcasts
the result. AdamW is elementwise, so the result equals that of an unsharded optimizer bit for bit.
Since no tensor is split, its state is saved with the sharding of the parameter and loads on any
mesh. (Megatron's DistributedOptimizer splits flat buffers; its checkpoints with plain torch AdamW
cannot be resharded.)
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.config.schema import OptimConfig
from lcdist.model.init import LORA_PARAMS, METHOD_PARAMS, whole_model_names
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.optimizer import (
    make_sharded_optimizer_tensor,
)
from megatron.core.tensor_parallel.layers import (
    param_is_not_tensor_parallel_duplicate,
)
from megatron.core.transformer.module import param_is_not_shared

# Elements per broadcast: enough to saturate a link, small next to a model.
BROADCAST_ELEMENTS = 2**26


class ShardedAdamW:
    """AdamW over the trained parameters of `chunks`, with state sharded over `group`.

    Reads each parameter's gradient from its fp32 `main_grad`, already reduced over `group`. Weight
    decay applies to matrices, not to norms, biases and parameters of an attention method.

    Args:
        chunks: this rank's model chunks.
        config: learning rate, betas, eps, weight decay and clipping.
        group: the DP x CP ranks, which hold the same parameters.
        lr_ratio: learning rate of LoRA's B relative to all others (LoRA+, arXiv:2402.12354).
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        config: OptimConfig,
        group: dist.ProcessGroup,
        lr_ratio: float = 1.0,
    ) -> None:
        self.config, self.group = config, group
        self.parameters = [
            (names[name], parameter)
            for chunk, names in [(chunk, whole_model_names(chunk)) for chunk in chunks]
            for name, parameter in chunk.named_parameters()
            if parameter.requires_grad
        ]
        owners = assign_owners([p.numel() for _, p in self.parameters], group.size())
        self.owned: list[list[nn.Parameter]] = [[] for _ in range(group.size())]
        for (_, parameter), owner in zip(self.parameters, owners, strict=True):
            self.owned[owner].append(parameter)
        self.mine = self.owned[group.rank()]
        self.masters = [_master(parameter) for parameter in self.mine]
        undecayed = {id(p) for name, p in self.parameters if METHOD_PARAMS in name}
        self.decays = [p.ndim > 1 and id(p) not in undecayed for p in self.mine]
        names = {id(parameter): name for name, parameter in self.parameters}
        self.lr_ratios = [
            lr_ratio if LORA_PARAMS in names[id(p)] and names[id(p)].endswith(".B") else 1.0
            for p in self.mine
        ]
        self.adamw = self._make_adamw() if self.mine else None

    def _make_adamw(self) -> torch.optim.AdamW:
        kinds = list(zip(self.decays, self.lr_ratios, strict=True))
        groups: list[dict[str, Any]] = [
            {
                "params": [m for m, k in zip(self.masters, kinds, strict=True) if k == kind],
                "weight_decay": self.config.weight_decay if kind[0] else 0.0,
                "lr_ratio": kind[1],
            }
            for kind in dict.fromkeys(kinds)
        ]
        adamw = torch.optim.AdamW(
            groups,
            lr=self.config.lr,
            betas=(self.config.beta1, self.config.beta2),
            eps=self.config.eps,
            fused=True,
        )
        for master in self.masters:
            # Create the state now instead of at the first step, so that a checkpoint can be loaded.
            adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
        return adamw

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Update the weights at learning rate `lr`; return the gradient norm before clipping.

        Raises FloatingPointError on every rank, before any change, if a gradient is not finite.
        """
        norm = self._gradient_norm()
        scale = 1.0
        if self.config.clip_norm and norm > self.config.clip_norm:
            scale = self.config.clip_norm / norm
        for parameter, master in zip(self.mine, self.masters, strict=True):
            gradient = parameter.main_grad  # type: ignore[attr-defined]
            master.grad = gradient.mul_(scale) if scale != 1.0 else gradient
        if self.adamw is not None:
            for group in self.adamw.param_groups:
                group["lr"] = lr * group["lr_ratio"]
            self.adamw.step()
        for parameter, master in zip(self.mine, self.masters, strict=True):
            master.grad = None
            if master is not parameter:
                parameter.copy_(master)
        self._broadcast()
        return norm

    def gradient(self, name: str) -> Tensor:
        """Return this rank's part of a gradient in fp32, by the parameter's whole-model name.

        Raises KeyError if this rank does not train the parameter.
        """
        return dict(self.parameters)[name].main_grad  # type: ignore[attr-defined]

    def _gradient_norm(self) -> float:
        """Return the global norm, in which replicas over TP and PP count once.

        Raises FloatingPointError if any gradient is not finite, replicas included.
        """
        unique, all_squares = [], []
        for parameter in self.mine:
            square = parameter.main_grad.double().square().sum()  # type: ignore[attr-defined]
            all_squares.append(square)
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter):
                unique.append(square)
        sums = [
            torch.stack(parts).sum() if parts else torch.zeros(())
            for parts in (unique, all_squares)
        ]
        squares = torch.stack([part.double().cpu() for part in sums])
        dist.all_reduce(squares)
        norm, norm_with_replicas = squares.sqrt().tolist()
        if not math.isfinite(norm_with_replicas):
            raise FloatingPointError(
                f"gradient norm is {norm_with_replicas}; parameters with non-finite gradients: "
                f"{', '.join(self._non_finite())}"
            )
        return norm

    def _non_finite(self) -> list[str]:
        """Return the names of non-finite gradients over all ranks; all ranks call it."""
        mine = [n for n, p in self.parameters if not p.main_grad.isfinite().all()]  # type: ignore[attr-defined]
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        return sorted({name for names in gathered for name in names})

    def _broadcast(self) -> None:
        """Broadcast each owner's new weights to the group, several tensors per message."""
        if self.group.size() == 1:
            return
        for owner, parameters in enumerate(self.owned):
            source = dist.get_global_rank(self.group, owner)
            for bucket in _buckets(parameters):
                flat = torch.cat([p.detach().reshape(-1) for p in bucket])
                dist.broadcast(flat, source, group=self.group)
                if owner != self.group.rank():
                    parts = flat.split([p.numel() for p in bucket])
                    for p, part in zip(bucket, parts, strict=True):
                        p.copy_(part.view_as(p))

    def refresh_masters(self) -> None:
        """Copy the weights into the fp32 masters, after weights were loaded without masters."""
        with torch.no_grad():
            for parameter, master in zip(self.mine, self.masters, strict=True):
                if master is not parameter:
                    master.copy_(parameter)

    def sharded_state_dict(self, model_state: Any) -> dict[str, Any]:
        """Return the optimizer state that this rank owns, sharded like the parameters.

        model_state: the sharded state dict of the same chunks.
        """
        sharded = {
            id(entry.data): entry
            for entry in nested_values(model_state)
            if isinstance(entry, ShardedTensor | ShardedTensorFactory)
        }
        state: dict[str, Any] = {}
        for parameter, master in zip(self.mine, self.masters, strict=True):
            assert self.adamw is not None
            entry: Any = sharded[id(parameter)]
            # Only the owner holds this tensor, so its replica number over DP x CP is 0.
            entry = replace(entry, replica_id=(*entry.replica_id[:-1], 0))
            tensors = {k: self.adamw.state[master][k] for k in ("exp_avg", "exp_avg_sq")}
            if master is not parameter:
                tensors["master"] = master.detach()
            state[str(len(state))] = {
                kind: make_sharded_optimizer_tensor(entry, tensor, f"optimizer.{kind}")
                for kind, tensor in tensors.items()
            }
        return state

    def load_sharded(self, loaded: dict[str, Any], steps_taken: int) -> None:
        """Copy in loaded state, in the shape that `sharded_state_dict` returned.

        steps_taken: optimizer steps behind the loaded state, for bias correction.
        """
        with torch.no_grad():
            for number, (parameter, master) in enumerate(zip(self.mine, self.masters, strict=True)):
                assert self.adamw is not None
                state, tensors = self.adamw.state[master], loaded[str(number)]
                state["exp_avg"].copy_(tensors["exp_avg"])
                state["exp_avg_sq"].copy_(tensors["exp_avg_sq"])
                state["step"].fill_(float(steps_taken))
                if master is not parameter:
                    master.copy_(tensors["master"])


def assign_owners(sizes: Sequence[int], count: int) -> list[int]:
    """Return an owner in 0..count-1 for each tensor.

    Assigns tensors from the largest to the smallest, each to the owner with the fewest elements.
    """
    load = [0] * count
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owner = min(range(count), key=lambda rank: (load[rank], rank))
        owners[index] = owner
        load[owner] += sizes[index]
    return owners


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().float())


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Group parameters into buckets of at most BROADCAST_ELEMENTS, or of one larger parameter."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BROADCAST_ELEMENTS:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
