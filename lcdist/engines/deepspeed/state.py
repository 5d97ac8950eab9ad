"""Weights and optimizer state of a DeepSpeed engine, one whole tensor at a time.

DeepSpeed's own checkpoints are pickled flat slices, bound to the number of ranks. Here each
parameter is gathered, and only its owner keeps it, in the host's memory, under the names that every
engine saves. So runs resume on another mesh and under another engine.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lcdist.engines.deepspeed.setup import partitions
from lcdist.engines.moments import assign_owners
from lcdist.hardware.deepspeed_on_cpu import import_deepspeed

KINDS = ("master", "exp_avg", "exp_avg_sq")


class WholeTensors:
    """Reads and writes whole parameters, masters and moments; all ranks of `group` call together.

    Args:
        engine: DeepSpeed's.
        parameters: the trained ones, in the same order on every rank.
        group: the ranks that hold the same parameters.
        device: of the weights.
    """

    def __init__(
        self,
        engine: Any,
        parameters: Sequence[nn.Parameter],
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self.engine, self.parameters = engine, list(parameters)
        self.group, self.device = group, device
        self._fragments = import_deepspeed().utils
        sizes = [local_shape(p).numel() for p in self.parameters]
        self.owners = assign_owners(sizes, group.size())
        has_masters = any(p.dtype != torch.float32 for p in self.parameters)
        self.kinds = KINDS if has_masters else KINDS[1:]

    @property
    def mine(self) -> list[nn.Parameter]:
        """The parameters whose state this rank names."""
        pairs = zip(self.parameters, self.owners, strict=True)
        return [p for p, owner in pairs if owner == self.group.rank()]

    def opened(self, parameter: nn.Parameter) -> AbstractContextManager[Any]:
        """Return a context in which a parameter is whole and can be written by all ranks alike."""
        if not hasattr(parameter, "ds_id"):
            return nullcontext()
        return import_deepspeed().zero.GatheredParameters([parameter], modifier_rank=0)

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """Return a copy of a whole weight."""
        with self.opened(parameter):
            return parameter.detach().clone()

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole gradient of a trained parameter in fp32, before clipping."""
        found = self._fragments.safe_get_full_grad(parameter)
        return found.detach().float().view(local_shape(parameter))

    def read_states(self) -> list[dict[str, Tensor]]:
        """Return the state of each parameter of `mine`, in the host's memory."""
        states = []
        for parameter, owner in zip(self.parameters, self.owners, strict=True):
            whole = {kind: self._read(parameter, kind) for kind in self.kinds}
            if owner == self.group.rank():
                shape = local_shape(parameter)
                states.append({k: x.detach().view(shape).cpu() for k, x in whole.items()})
        return states

    def write_states(self, states: Sequence[Mapping[str, Tensor]], steps: int) -> None:
        """Take over the state of each parameter of `mine`, and of all others from their owners.

        steps: optimizer steps behind it, for bias correction.
        """
        mine = iter(states)
        for parameter, owner in zip(self.parameters, self.owners, strict=True):
            state = next(mine) if owner == self.group.rank() else {}
            for kind in self.kinds:
                whole = self.from_owner(
                    state.get(kind), local_shape(parameter), torch.float32, owner
                )
                self._write(parameter, kind, whole)
        for part in partitions(self.engine):
            self.engine.basic_optimizer.state[part]["step"].fill_(steps)

    def from_owner(
        self, tensor: Tensor | None, shape: torch.Size, dtype: torch.dtype, owner: int
    ) -> Tensor:
        """Return on the device the tensor that the owner gives; others give None."""
        if tensor is None:
            whole = torch.empty(shape, dtype=dtype, device=self.device)
        else:
            whole = tensor.to(self.device, dtype).contiguous()
        if self.group.size() > 1:
            dist.broadcast(whole, dist.get_global_rank(self.group, owner), group=self.group)
        return whole

    def _read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        if not self.engine.zero_optimization():
            return self.engine.basic_optimizer.state[parameter][kind]
        if kind == "master":
            return self._fragments.safe_get_full_fp32_param(parameter)
        return self._fragments.safe_get_full_optimizer_state(parameter, kind)

    def _write(self, parameter: nn.Parameter, kind: str, whole: Tensor) -> None:
        if not self.engine.zero_optimization():
            self.engine.basic_optimizer.state[parameter][kind].copy_(whole)
        elif kind == "master":
            self._fragments.safe_set_full_fp32_param(parameter, whole)
        else:
            self._fragments.safe_set_full_optimizer_state(parameter, whole, kind)


def local_shape(parameter: nn.Parameter) -> torch.Size:
    """Return a parameter's shape on this tensor-parallel rank, also where ZeRO-3 divides it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
