"""Forward passes with Megatron's pipeline schedules, without DDP and without an optimizer."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.data.loader import Batch
from lcdist.distributed.mesh import Mesh
from lcdist.engines.engine import StepLoss
from lcdist.engines.loss import loss_sum
from lcdist.engines.state import load_model_state, model_state
from lcdist.layout import ContextLayout
from lcdist.model.build import CausalLM
from lcdist.model.sequence import SequenceParams
from megatron.core.pipeline_parallel import get_forward_backward_func

Reduce = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class MegatronForward:
    """A `ForwardEngine` over the model chunks of this rank."""

    def __init__(self, mesh: Mesh, chunks: Sequence[CausalLM]) -> None:
        self.mesh, self.chunks = mesh, list(chunks)

    def evaluate(self, batches: Sequence[Batch], layout: ContextLayout, seqlen: int) -> StepLoss:
        """Return the loss of all ranks' batches, without gradients; as `ForwardEngine` says."""
        return self._global_mean(self._log_entry(self._forward(batches, layout, seqlen, loss_sum)))

    def token_losses(self, batches: Sequence[Batch], layout: ContextLayout, seqlen: int) -> Tensor:
        """Return the loss of every token of all ranks' batches; as `ForwardEngine` says."""
        found = self._forward(batches, layout, seqlen, _with_token_losses)
        mesh, rows = self.mesh, batches[0].tokens.shape[0]
        shape = len(batches), rows * mesh.dp_size, layout.seqlen
        # Each loss is on one of the ranks that count, so the sum over all ranks is that loss.
        losses = torch.zeros(shape, dtype=torch.float64)
        if self._counts:
            own = torch.stack(found).to("cpu", torch.float64)
            own_rows = slice(mesh.dp_rank * rows, (mesh.dp_rank + 1) * rows)
            losses[:, own_rows, layout.positions(mesh.cp_rank)] = own
        dist.all_reduce(losses)
        return losses

    def _forward(
        self, batches: Sequence[Batch], layout: ContextLayout, seqlen: int, reduce: Reduce
    ) -> list[Tensor]:
        """Run the batches without gradients; return the third result of `reduce` for each."""
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            found = run_schedule(self.chunks, batches, layout, seqlen, True, reduce)
        for chunk in self.chunks:
            chunk.train()
        return found

    @property
    def _counts(self) -> bool:
        """Return whether this rank counts the losses it has: each loss is counted once."""
        return self.mesh.is_last_stage and self.mesh.tp_rank == 0

    def state_dict(self, weights_only: bool = False) -> dict[str, Any]:
        """Return the sharded weights under "model"."""
        return {"model": model_state(self.chunks)}

    def load_state(self, loaded: dict[str, Any], steps_taken: int = 0) -> None:
        """Take over loaded weights."""
        load_model_state(self.chunks, loaded["model"])

    def _global_mean(self, log_entry: Tensor) -> StepLoss:
        """Read the sum over all ranks of their log entries."""
        total = log_entry.to("cpu", copy=True)
        dist.all_reduce(total)
        return step_loss(*total.tolist())

    def _log_entry(self, losses: list[Tensor]) -> Tensor:
        """Return [sum, number] of the losses that this rank counts, float64; each loss once."""
        if self._counts:
            return torch.stack(losses).sum(0) if len(losses) > 1 else losses[0]
        return torch.zeros(2, dtype=torch.float64, device=self.mesh.device)


def _with_token_losses(losses: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `loss_sum` does, with the losses `[b, s_local]` in place of the log entry."""
    return *loss_sum(losses, loss_mask)[:2], losses.detach()


def step_loss(total: float, tokens: float) -> StepLoss:
    """Return the mean of summed losses: divided once, by all tokens."""
    return StepLoss(total / max(1.0, tokens), round(tokens))


def run_schedule(
    models: Sequence[nn.Module],
    batches: Sequence[Batch],
    layout: ContextLayout,
    seqlen: int,
    forward_only: bool,
    reduce: Reduce = loss_sum,
) -> list[Tensor]:
    """Run every micro-batch through this rank's model chunks, as Megatron schedules them.

    Args:
        models: the chunks, or their DDP wrappers for a backward pass.
        batches: micro-batches, on this rank's device.
        layout: how their sequences are cut over the context-parallel ranks.
        seqlen: tokens of their sequences without the layout's padding.
        forward_only: leave out the backward pass.
        reduce: maps losses and loss mask to the sum to differentiate, the number of tokens, and
            what is returned.

    Returns:
        The third result of `reduce`, one a micro-batch; an empty list before the last stage.
    """
    # One iterator a chunk: with interleaving each chunk draws all micro-batches itself.
    iterators: Any = [iter(batches) for _ in models]
    single = len(models) == 1
    schedule: Callable[..., list[Tensor]] = get_forward_backward_func()
    return schedule(
        forward_step_func=partial(_forward_step, layout, seqlen, reduce),
        data_iterator=iterators[0] if single else iterators,
        model=models[0] if single else [*models],
        num_microbatches=len(batches),
        seq_length=layout.seqlen,
        micro_batch_size=batches[0].tokens.shape[0],
        forward_only=forward_only,
    )


def _forward_step(
    layout: ContextLayout, seqlen: int, reduce: Reduce, iterator: Any, model: Any
) -> tuple[Tensor, Any]:
    batch: Batch = next(iterator)
    sequence = SequenceParams(layout=layout, seqlen=seqlen, cu_seqlens=batch.cu_seqlens)
    # Attention computes positions itself; Megatron's signature still requires the argument.
    losses = model(
        batch.tokens,
        None,
        None,
        labels=batch.labels,
        packed_seq_params=sequence,
    )
    return losses, lambda output: reduce(output, batch.loss_mask)
