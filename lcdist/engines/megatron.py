"""The training engine over Megatron's DDP and pipeline schedules, with a sharded AdamW."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.data.loader import Batch
from lcdist.distributed.mesh import Mesh
from lcdist.engines.engine import PendingLoss
from lcdist.engines.forward import MegatronForward, run_schedule, step_loss
from lcdist.engines.optimizer import ShardedAdamW
from lcdist.engines.state import load_whole_tensors
from lcdist.exchange import Stopwatch
from lcdist.model.build import CausalLM
from lcdist.model.gradient import start_step
from lcdist.plan import Plan
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)


class MegatronEngine(MegatronForward):
    """A `TrainEngine`: the model chunks, their gradient buffers and the optimizer of this rank."""

    def __init__(self, plan: Plan, mesh: Mesh, chunks: Sequence[CausalLM]) -> None:
        super().__init__(mesh, chunks)
        self.plan = plan
        megatron = self.chunks[0].config
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=mesh.dp_cp_group.size() > 1,
            use_distributed_optimizer=False,
        )
        # The first chunk's gradients come last and gain nothing from more buckets.
        self.wrapped = [
            DistributedDataParallel(megatron, ddp, chunk, disable_bucketing=i > 0)
            for i, chunk in enumerate(self.chunks)
        ]
        no_sync = [chunk.no_sync for chunk in self.wrapped]
        megatron.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync  # type: ignore[assignment]
        megatron.finalize_model_grads_func = self._finalize
        self._watch: Stopwatch | None = None
        self._log = torch.zeros(2, dtype=torch.float64, device=mesh.device)
        self._loss = PendingLoss(partial(self._global_mean, self._log))
        self._num_tokens = torch.zeros((), dtype=torch.int32, device=mesh.device)
        optim, lr_ratio = plan.config.optim, plan.config.lora.lr_ratio
        self.optimizer = ShardedAdamW(self.chunks, optim, mesh.dp_cp_group, lr_ratio)

    def forward_backward(
        self, batches: Sequence[Batch], while_waiting: Callable[[], None] | None = None
    ) -> PendingLoss:
        """Compute the gradients of the global mean loss; as `TrainEngine` says."""
        for chunk in self.wrapped:
            start_step(chunk.params_with_grad)
            for group in chunk.bucket_groups:
                group.reset()
        self._watch = Stopwatch(self.mesh.device.type == "cuda")
        seqlen = self.plan.config.train.seqlen
        losses = run_schedule(self.wrapped, batches, self.plan.layout, seqlen, forward_only=False)
        if while_waiting is not None:
            while_waiting()
        self._log = self._log_entry(losses)
        self._loss = PendingLoss(partial(self._global_mean, self._log))
        return self._loss

    @property
    def seconds_before_reduction(self) -> float:
        """Seconds of the last forward and backward until gradients were summed over ranks."""
        return self._watch.seconds if self._watch is not None else 0.0

    def _finalize(
        self, chunks: list[nn.Module], num_tokens: Tensor, *args: Any, **options: Any
    ) -> None:
        """Stop the clock and sum gradients over ranks: from here on ranks wait for each other.

        Gradients stay sums over tokens: the optimizer divides them as it reads them. Megatron would
        do so in a pass of its own, and the host would wait for the number.
        """
        if self._watch is not None:
            self._watch.stop()
        finalize_model_grads(chunks, None, *args, **options)
        mesh = self.mesh
        # Of the pipeline, the last stage alone has counted.
        for group in (mesh.pp_group, mesh.dp_cp_group):
            if group.size() > 1:
                dist.all_reduce(num_tokens, group=group)
        self._num_tokens = num_tokens

    def step(self, lr: float) -> float:
        """Update the weights; return the gradient norm before clipping; as `TrainEngine` says."""
        # The host waits for the device here, and nowhere else in a step.
        totals = self.optimizer.step(lr, self._log).tolist()
        self._loss.settle(step_loss(*totals[:2]))
        return self.optimizer.accept(totals)

    def gradient(self, name: str) -> Tensor:
        """Return this rank's part of a gradient in fp32, by the parameter's whole-model name."""
        return self.optimizer.gradient(name) / self._num_tokens.clamp(min=1)

    def load_adapter(self, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
        """Replace the weights that `tensors` names, by their whole-model names."""
        load_whole_tensors(self.chunks, tensors, self.mesh.tp_rank)
        self.weights_changed()

    def weights_changed(self) -> None:
        """Copy the weights into the optimizer's fp32 masters."""
        self.optimizer.refresh_masters()

    def state_dict(self, weights_only: bool = False) -> dict[str, Any]:
        """Return the sharded weights, and the sharded optimizer state unless `weights_only`."""
        state = super().state_dict()
        if not weights_only:
            state["optimizer"] = self.optimizer.sharded_state_dict(state["model"])
        return state

    def load_state(self, loaded: dict[str, Any], steps_taken: int = 0) -> None:
        """Take over loaded weights; without optimizer state, masters follow the weights."""
        super().load_state(loaded)
        if "optimizer" in loaded:
            self.optimizer.load_sharded(loaded["optimizer"], steps_taken)
        else:
            self.weights_changed()
