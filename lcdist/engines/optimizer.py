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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.config.schema import OptimConfig
from lcdist.engines.engine import NoTargetError, RefusedStepError
from lcdist.engines.moments import assign_owners, entries_by_parameter, sharded_moments
from lcdist.engines.parameters import TrainedParameter, trained_parameters
from lcdist_kernels.adamw import Hyper, Tensors, adamw_
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
        trained = trained_parameters(chunks, lr_ratio)
        self.parameters = [(one.name, one.parameter) for one in trained]
        owners = assign_owners([p.numel() for _, p in self.parameters], group.size())
        by_owner: list[list[TrainedParameter]] = [[] for _ in range(group.size())]
        for one, owner in zip(trained, owners, strict=True):
            by_owner[owner].append(one)
        self.owned = [[one.parameter for one in some] for some in by_owner]
        self.mine = self.owned[group.rank()]
        self.masters = [_master(parameter) for parameter in self.mine]
        self.decays = [one.decays for one in by_owner[group.rank()]]
        self.lr_ratios = [one.lr_ratio for one in by_owner[group.rank()]]
        # State exists from the start, so that a checkpoint can be loaded before the first step.
        self.first, self.second = ([torch.zeros_like(m) for m in self.masters] for _ in range(2))
        self.steps = 0
        self._counted = self._counts()

    def _counts(self) -> Tensor:
        """Return float64 `[2, owned]`: 1 where a gradient counts in the norm; 1 everywhere."""
        unique = [
            float(param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p))
            for p in self.mine
        ]
        counts = torch.tensor([unique, [1.0] * len(unique)], dtype=torch.float64)
        return counts.to(self.parameters[0][1].device) if self.parameters else counts

    @torch.no_grad()
    def step(self, lr: float, log_entry: Tensor) -> Tensor:
        """Queue an update of the weights; the host waits for nothing.

        Gradients in `main_grad` are sums over tokens. Nothing is written on any rank if the loss or
        a gradient is not finite on one, replicas included, or if no token has a loss.

        Args:
            lr: learning rate.
            log_entry: float64 `[2]`: sum of the losses that this rank counts, and their number.

        Returns:
            Float64 `[4]` for `accept`, the same on all ranks: summed loss, number of its tokens,
            squared norm of the summed gradients, and the same with replicas over TP and PP.
        """
        totals = torch.cat([log_entry, self._squares()])
        if dist.get_world_size() > 1:
            dist.all_reduce(totals)
        adamw_(self._tensors(), totals, self._hyper(lr))
        self._broadcast()
        return totals

    def accept(self, totals: Sequence[float]) -> float:
        """Count a step as taken; return its gradient norm before clipping.

        Args:
            totals: what `step` returned, read by the host.

        Raises:
            RefusedStepError: nothing was written; on every rank.
        """
        loss, tokens, squares, all_squares = totals
        if not math.isfinite(all_squares):
            ranks, names = self._non_finite()
            norm = math.sqrt(all_squares)
            raise RefusedStepError(
                f"gradient norm is {norm}, loss {_mean(loss, tokens)}", ranks, names
            )
        if not math.isfinite(loss):
            raise RefusedStepError(f"loss is {loss}, and no gradient shows it")
        if not tokens:
            raise NoTargetError
        self.steps += 1
        return math.sqrt(squares) / tokens

    def _tensors(self) -> Tensors:
        pairs = zip(self.mine, self.masters, strict=True)
        return Tensors(
            gradients=[p.main_grad for p in self.mine],  # type: ignore[attr-defined]
            masters=self.masters,
            first=self.first,
            second=self.second,
            weights=[None if master is weight else weight for weight, master in pairs],
            decays=[self.config.weight_decay if decays else 0.0 for decays in self.decays],
            lr_ratios=self.lr_ratios,
        )

    def _hyper(self, lr: float) -> Hyper:
        config = self.config
        return Hyper(lr, config.beta1, config.beta2, config.eps, self.steps + 1, config.clip_norm)

    def _squares(self) -> Tensor:
        """Return this rank's last two totals, float64 `[2]`."""
        if not self.mine:
            return self._counted.new_zeros(2)
        gradients = [p.main_grad for p in self.mine]  # type: ignore[attr-defined]
        found = torch._foreach_norm(gradients, 2, dtype=torch.float64)  # pyright: ignore[reportPrivateImportUsage]
        norms = torch.stack(list(found))
        return self._counted.mv(norms * norms)

    def gradient(self, name: str) -> Tensor:
        """Return this rank's part of a gradient summed over tokens, by its whole-model name.

        Raises KeyError if this rank does not train the parameter.
        """
        return dict(self.parameters)[name].main_grad  # type: ignore[attr-defined]

    def _non_finite(self) -> tuple[list[int], list[str]]:
        """Return the ranks with non-finite gradients, and their names; all ranks call it.

        Gradients are sums over data- and context-parallel ranks by then, so ranks tell the pipeline
        stage and the tensor-parallel part.
        """
        mine = [n for n, p in self.parameters if not p.main_grad.isfinite().all()]  # type: ignore[attr-defined]
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        ranks = [rank for rank, names in enumerate(gathered) if names]
        return ranks, sorted({name for names in gathered for name in names})

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
        states = []
        for number, (parameter, master) in enumerate(zip(self.mine, self.masters, strict=True)):
            state = {"exp_avg": self.first[number], "exp_avg_sq": self.second[number]}
            if master is not parameter:
                state["master"] = master.detach()
            states.append(state)
        return sharded_moments(self.mine, states, entries_by_parameter(model_state))

    def load_sharded(self, loaded: dict[str, Any], steps_taken: int) -> None:
        """Copy in loaded state, in the shape that `sharded_state_dict` returned.

        steps_taken: optimizer steps behind the loaded state, for bias correction.
        """
        self.steps = steps_taken
        with torch.no_grad():
            for number, (parameter, master) in enumerate(zip(self.mine, self.masters, strict=True)):
                tensors = loaded[str(number)]
                self.first[number].copy_(tensors["exp_avg"])
                self.second[number].copy_(tensors["exp_avg_sq"])
                if master is not parameter:
                    master.copy_(tensors["master"])


def _mean(loss: float, tokens: float) -> float:
    return loss / tokens if tokens else math.nan


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
