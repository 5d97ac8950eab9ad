"""The loop over the steps: batches in, one update each, a record out, a checkpoint now and then."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lcdist.config import dump
from lcdist.data.loader import Batch, Loader
from lcdist.exchange import traffic
from lcdist.parallel import Grid
from lcdist.plan import Plan
from lcdist.train.checkpoint import (
    Checkpoint,
    Checkpointer,
    CheckpointError,
    load_state,
    load_weights,
)
from lcdist.train.engines.megatron import MegatronEngine
from lcdist.train.header import versions
from lcdist.train.metrics import Metrics
from lcdist.train.peak import Peak, max_over_ranks, mfu, peak_memory
from lcdist.train.records import StepRecord, StepTime
from lcdist.train.schedule import learning_rate
from lcdist.train.signals import StopSignals
from lcdist.train.state import load_random_states, random_states, sharded_random_states

log = logging.getLogger(__name__)
VERBS = ("ring", "shift", "gather", "swap")


@dataclass(frozen=True)
class Outcome:
    """How a training loop ended. status: "finished" or "stopped"; reason: in a few words."""

    status: str
    step: int
    reason: str


class Trainer:
    """Runs steps from wherever the engine and the loader stand, to the end or a stop signal."""

    def __init__(  # noqa: PLR0913
        self,
        plan: Plan,
        grid: Grid,
        engine: MegatronEngine,
        loader: Loader,
        checkpointer: Checkpointer,
        peak: Peak,
    ) -> None:
        self.plan, self.grid, self.engine = plan, grid, engine
        self.loader, self.checkpointer, self.peak = loader, checkpointer, peak
        self.step = 0
        self.saved_step = 0

    def train(self, metrics: Metrics) -> Outcome:
        """Run until train.steps or until any rank is told to stop; saves before it returns.

        Raises FloatingPointError where a gradient is not finite.
        """
        steps, every = self.plan.config.train.steps, self.plan.config.checkpoint.every
        reason = ""
        with StopSignals() as signals:
            while self.step < steps and not reason:
                record, asked = self._one_step(signals)
                metrics.write(record)
                if asked:
                    reason = f"told to stop ({signals.reason or 'by another rank'})"
                if reason or self.step == steps or (every and self.step % every == 0):
                    self.save()
        if self.step < steps:
            return Outcome("stopped", self.step, reason)
        return Outcome("finished", self.step, f"all {steps} steps done")

    def _one_step(self, signals: StopSignals) -> tuple[StepRecord, bool]:
        train, begun = self.plan.config.train, time.perf_counter()
        lr = learning_rate(self.plan.config.optim, self.step, train.steps)
        batches = [to_device(batch, self.grid.device) for batch in self.loader.next_step()]
        drawn = time.perf_counter()
        with traffic() as sent:
            loss, tokens = self.engine.forward_backward(batches)
        differentiated = time.perf_counter()
        grad_norm = self.engine.update(lr)
        updated = time.perf_counter()
        self.step += 1
        most = self._most(signals, sent.sent)
        ended = time.perf_counter()
        rate = tokens / (ended - begun)
        record = StepRecord(
            step=self.step,
            samples=self.loader.sample,
            tokens=tokens,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            tokens_per_second=rate,
            mfu_full=mfu(self.plan.flops_per_token_square, rate, self.peak, self.grid.world_size),
            mfu_causal=mfu(self.plan.flops_per_token, rate, self.peak, self.grid.world_size),
            memory_bytes=most["memory"],
            exchange_bytes={verb: most[verb] for verb in VERBS if most[verb]},
            time=StepTime(
                step=ended - begun,
                data=drawn - begun,
                forward_backward=differentiated - drawn,
                optimizer=updated - differentiated,
            ),
            wall=time.time(),
        )
        return record, bool(most["stop"])

    def _most(self, signals: StopSignals, sent: Mapping[str, int]) -> dict[str, int]:
        """The maximum over ranks of what each saw: one message also carries the wish to stop."""
        mine = {"stop": int(signals.reason is not None), "memory": peak_memory(self.grid.device)}
        mine |= {verb: sent.get(verb, 0) for verb in VERBS}
        return max_over_ranks(mine, dist.group.WORLD, torch.device("cpu"))

    def save(self) -> None:
        """A checkpoint of everything at the current step; all ranks call it."""
        state = self.engine.sharded_state_dict()
        state["rng"] = sharded_random_states(self.grid.rank, self.grid.world_size)
        manifest = {
            "config": dump(self.plan.config),
            "plan": dict(self.plan.rows()),
            "dtype": self.plan.dtype,
            "world_size": self.grid.world_size,
            "loader": self.loader.state_dict(),
            "random_states": sorted(state["rng"]),
            "versions": versions(),
        }
        path = self.checkpointer.save(self.step, state, manifest)
        self.saved_step = self.step
        log.info("saved %s", path)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue exactly where `checkpoint` was written, on this mesh, whatever its own was.

        Raises CheckpointError where the weights were kept in another dtype.
        """
        manifest = checkpoint.manifest
        if manifest["dtype"] != self.plan.dtype:
            raise CheckpointError(
                f"{checkpoint.path} was trained in {manifest['dtype']}, this run in "
                f"{self.plan.dtype}: set train.dtype = '{manifest['dtype']}'"
            )
        state = self.engine.sharded_state_dict()
        names = sorted(random_states())
        same_world = manifest["world_size"] == self.grid.world_size
        if same_world and manifest["random_states"] == names:
            state["rng"] = sharded_random_states(self.grid.rank, self.grid.world_size)
        loaded = load_state(checkpoint, state)
        self.engine.load_state(loaded, checkpoint.step)
        self.loader.load_state_dict(manifest["loader"])
        if "rng" in state:
            load_random_states(loaded["rng"])
        else:
            log.info("another mesh than the checkpoint's: random states start from train.seed")
        self.step = self.saved_step = checkpoint.step

    def start_from(self, checkpoint: Checkpoint) -> None:
        """Begin a new run from the weights of `checkpoint` alone."""
        model = load_weights(checkpoint, self.engine.weights_state_dict()["model"])
        self.engine.load_state({"model": model}, 0)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on `device`; document tables stay where they are read, on the CPU."""
    moved: dict[str, Any] = {
        name: getattr(batch, name).to(device, non_blocking=True)
        for name in ("tokens", "labels", "loss_mask")
    }
    return Batch(**moved, cu_seqlens=batch.cu_seqlens)
