"""The `megatron` engine: Megatron's DDP and pipeline schedules over our model and optimizer."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.data.loader import Batch
from lcdist.distributed.mesh import Mesh
from lcdist.engines.loss import loss_sum
from lcdist.engines.optimizer import ShardedAdamW
from lcdist.engines.state import load_model_state, model_state
from lcdist.exchange import Stopwatch
from lcdist.layout import ContextLayout
from lcdist.model.build import CausalLM
from lcdist.model.sequence import SequenceParams
from lcdist.plan import Plan
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func


class MegatronEngine:
    """Owns the model chunks and the optimizer, and runs steps over any mesh."""

    def __init__(self, plan: Plan, mesh: Mesh, chunks: Sequence[CausalLM]) -> None:
        self.plan, self.mesh, self.chunks = plan, mesh, list(chunks)
        self.megatron = chunks[0].config
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=mesh.dp_cp_group.size() > 1,
            use_distributed_optimizer=False,
        )
        # The first chunk's gradients come last and gain nothing from more buckets.
        self.wrapped = [
            DistributedDataParallel(self.megatron, ddp, chunk, disable_bucketing=i > 0)
            for i, chunk in enumerate(chunks)
        ]
        no_sync = [chunk.no_sync for chunk in self.wrapped]
        self.megatron.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync  # type: ignore[assignment]
        self.megatron.finalize_model_grads_func = self._finalize
        self.watch: Stopwatch | None = None
        self.optimizer = ShardedAdamW(
            self.chunks, plan.config.optim, mesh.dp_cp_group, plan.config.lora.lr_ratio
        )

    def forward_backward(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Gradients of the step's global mean loss into every `main_grad`; (loss, tokens)."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.watch = Stopwatch(self.mesh.device.type == "cuda")
        seqlen = self.plan.config.train.seqlen
        return self._run(batches, self.plan.layout, seqlen, forward_only=False)

    @property
    def seconds_before_reduction(self) -> float:
        """Of the last step's forward and backward, up to where gradients are summed over ranks."""
        return self.watch.seconds if self.watch is not None else 0.0

    def _finalize(self, *args: Any, **words: Any) -> None:
        """From here on all ranks wait for one another."""
        if self.watch is not None:
            self.watch.stop()
        finalize_model_grads(*args, **words)

    def update(self, lr: float) -> float:
        """One optimizer step at learning rate `lr`; the gradient norm before clipping.

        Raises FloatingPointError where the gradient is not finite.
        """
        return self.optimizer.step(lr)

    def evaluate(
        self, batches: Sequence[Batch], layout: ContextLayout, seqlen: int
    ) -> tuple[float, int]:
        """(mean loss in nats, tokens) of all ranks' batches, cut by `layout`; no gradients.

        seqlen: tokens of their sequences without the layout's padding.
        """
        for chunk in self.wrapped:
            chunk.eval()
        with torch.no_grad():
            result = self._run(batches, layout, seqlen, forward_only=True)
        for chunk in self.wrapped:
            chunk.train()
        return result

    def _run(
        self, batches: Sequence[Batch], layout: ContextLayout, seqlen: int, forward_only: bool
    ) -> tuple[float, int]:
        # One iterator a chunk: with interleaving each chunk draws all micro-batches itself.
        iterators: Any = [iter(batches) for _ in self.wrapped]
        single = len(self.wrapped) == 1
        losses = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, layout, seqlen),
            data_iterator=iterators[0] if single else iterators,
            model=self.wrapped[0] if single else [*self.wrapped],
            num_microbatches=len(batches),
            seq_length=layout.seqlen,
            micro_batch_size=batches[0].tokens.shape[0],
            forward_only=forward_only,
        )
        return self._global_mean(losses)

    def _global_mean(self, losses: list[Tensor]) -> tuple[float, int]:
        """Sum over every rank that computed a loss once, divided once by the number of tokens."""
        total = torch.zeros(2, dtype=torch.float64)
        if self.mesh.is_last_stage and self.mesh.tp_rank == 0:
            total += torch.stack(losses).sum(0).cpu()
        dist.all_reduce(total)
        tokens = int(total[1].item())
        return total[0].item() / max(1, tokens), tokens

    def sharded_state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state for a checkpoint."""
        model = model_state(self.chunks)
        return {"model": model, "optimizer": self.optimizer.sharded_state_dict(model)}

    def weights_state_dict(self) -> dict[str, Any]:
        """Weights alone, to start a new run from."""
        return {"model": model_state(self.chunks)}

    def load_state(self, loaded: dict[str, Any], steps_taken: int) -> None:
        """Continue from what `sharded_state_dict` or `weights_state_dict` asked for."""
        load_model_state(self.chunks, loaded["model"])
        if "optimizer" in loaded:
            self.optimizer.load_sharded(loaded["optimizer"], steps_taken)
        else:
            self.optimizer.refresh_masters()


def _forward_step(
    layout: ContextLayout, seqlen: int, iterator: Any, model: Any
) -> tuple[Tensor, Any]:
    batch: Batch = next(iterator)
    sequence = SequenceParams(layout=layout, seqlen=seqlen, cu_seqlens=batch.cu_seqlens)
    # Positions are the attention's business; Megatron asks for the argument all the same.
    losses = model(
        batch.tokens,
        None,
        None,
        labels=batch.labels,
        packed_seq_params=sequence,
    )
    return losses, lambda output: loss_sum(output, batch.loss_mask)
