"""AdamW whose state is sharded over the ranks that hold the same parameters (ZeRO stage 1).

ZeRO (arXiv:1910.02054) with whole tensors: each parameter has one owner in the DP x CP group, which
keeps its moments (and, for bf16 weights, its fp32 master), steps it, and broadcasts the result.
AdamW is elementwise, so the result is bit for bit that of an unsharded optimizer, and since no
tensor is ever cut, its state is saved under the sharding of the parameter itself and can be loaded
on any mesh. (Megatron's own DistributedOptimizer cuts flat buffers; its checkpoints with plain
torch AdamW do not survive resharding.)
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
from lcdist.model.init import EXTRAS, LORA, whole_model_names
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

# Elements broadcast at once: enough to fill a link, little beside a model.
BROADCAST_ELEMENTS = 2**26


class ShardedAdamW:
    """AdamW over the parameters of `chunks`, its state sharded over `group` (DP x CP).

    Gradients are read from each parameter's fp32 `main_grad`, already reduced over `group`.
    Matrices decay; norms and what an attention method learns beside its projections do not.
    lr_ratio: the learning rate of LoRA's B over that of everything else (LoRA+, arXiv:2402.12354).
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
        extras = {id(parameter) for name, parameter in self.parameters if EXTRAS in name}
        self.decays = [
            m.ndim > 1 and id(p) not in extras for p, m in zip(self.mine, self.masters, strict=True)
        ]
        names = {id(parameter): name for name, parameter in self.parameters}
        self.lr_ratios = [
            lr_ratio if LORA in names[id(p)] and names[id(p)].endswith(".B") else 1.0
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
            # Made now and not at the first step, so that a checkpoint always finds its place.
            adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
        return adamw

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """One update at learning rate `lr`; returns the global gradient norm before clipping.

        Raises FloatingPointError, on every rank and before anything is changed, when the norm is
        not finite.
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
        """Over every parameter of the model once: copies over TP and PP are left out.

        Copies are looked at all the same: one that is not finite is a fault, too.
        """
        once, all_copies = [], []
        for parameter in self.mine:
            square = parameter.main_grad.double().square().sum()  # type: ignore[attr-defined]
            all_copies.append(square)
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter):
                once.append(square)
        sums = [
            torch.stack(parts).sum() if parts else torch.zeros(()) for parts in (once, all_copies)
        ]
        squares = torch.stack([part.double().cpu() for part in sums])
        dist.all_reduce(squares)
        norm, over_copies = squares.sqrt().tolist()
        if not math.isfinite(over_copies):
            raise FloatingPointError(
                f"gradient norm is {over_copies}; parameters with non-finite gradients: "
                f"{', '.join(self._non_finite())}"
            )
        return norm

    def _non_finite(self) -> list[str]:
        """Names over all ranks; all ranks call it."""
        mine = [n for n, p in self.parameters if not p.main_grad.isfinite().all()]  # type: ignore[attr-defined]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        return sorted({name for names in found for name in names})

    def _broadcast(self) -> None:
        """Every owner's new values to all, in pieces."""
        if self.group.size() == 1:
            return
        for owner, parameters in enumerate(self.owned):
            source = dist.get_global_rank(self.group, owner)
            for piece in _pieces(parameters):
                flat = torch.cat([p.detach().reshape(-1) for p in piece])
                dist.broadcast(flat, source, group=self.group)
                if owner != self.group.rank():
                    for p, part in zip(piece, flat.split([p.numel() for p in piece]), strict=True):
                        p.copy_(part.view_as(p))

    def refresh_masters(self) -> None:
        """Take the fp32 masters from the weights, after weights were loaded without them."""
        with torch.no_grad():
            for parameter, master in zip(self.mine, self.masters, strict=True):
                if master is not parameter:
                    master.copy_(parameter)

    def sharded_state_dict(self, model_state: Any) -> dict[str, Any]:
        """This rank's share of the state, sharded as the parameters in `model_state` are.

        model_state: the sharded state dict of the same chunks. Only owners name their tensors.
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
            # The owner is the only one to hold this: the replica number over DP x CP becomes 0.
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
        """Continue from loaded state, in the shape `sharded_state_dict` asked for."""
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
    """An owner in 0..count-1 for each tensor: largest first, each to whoever has least so far."""
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


def _pieces(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    piece: list[nn.Parameter] = []
    for parameter in parameters:
        if piece and sum(p.numel() for p in piece) + parameter.numel() > BROADCAST_ELEMENTS:
            yield piece
            piece = []
        piece.append(parameter)
    if piece:
        yield piece
