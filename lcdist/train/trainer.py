"""The loop over the steps: batches in, one update each, a record out, a checkpoint now and then."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lcdist.checkpoint.read import (
    Checkpoint,
    CheckpointError,
    load_state,
    load_weights,
)
from lcdist.checkpoint.save import Checkpointer
from lcdist.config import dump
from lcdist.data.loader import Batch, Loader
from lcdist.distributed.mesh import Mesh
from lcdist.distributed.watchdog import Noted, Watchdog
from lcdist.engines.megatron import MegatronEngine
from lcdist.engines.state import load_random_states, random_states, sharded_random_states
from lcdist.exchange import traffic
from lcdist.hardware.peak import Peak, max_over_ranks, mfu, peak_memory
from lcdist.plan import Plan, plan_rows
from lcdist.rundir.header import versions
from lcdist.rundir.paths import step_of
from lcdist.rundir.records import RankTimes, StepRecord, StepTime
from lcdist.rundir.signals import STOP
from lcdist.train.metrics import Metrics
from lcdist.train.schedule import learning_rate
from lcdist.train.stop_requests import StopRequests

log = logging.getLogger(__name__)
RANKS = 2**20
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
        mesh: Mesh,
        engine: MegatronEngine,
        loader: Loader,
        checkpointer: Checkpointer,
        peak: Peak,
    ) -> None:
        self.plan, self.mesh, self.engine = plan, mesh, engine
        self.loader, self.checkpointer, self.peak = loader, checkpointer, peak
        self.also_stop: Sequence[Path] = ()
        self.step = 0
        self.saved_step = 0

    def train(
        self, metrics: Metrics, watchdog: Watchdog, first_step: Callable[[], None]
    ) -> Outcome:
        """Run until train.steps or until any rank is told to stop; saves before it returns.

        watchdog: hears of every part of a step. first_step: called after the first. Raises
        FloatingPointError where a gradient is not finite.
        """
        steps, every = self.plan.config.train.steps, self.plan.config.checkpoint.every
        asynchronous = self.plan.config.checkpoint.asynchronous
        reason = ""
        with StopRequests(self._stop_files()) as requests:
            while self.step < steps and not reason:
                record, asked = self._one_step(requests, watchdog)
                metrics.write(record)
                first_step()
                first_step = _nothing
                if asked:
                    reason = f"told to stop ({requests.reason or 'by another rank'})"
                ends = bool(reason) or self.step == steps
                if ends or (every and self.step % every == 0):
                    watchdog.moved(self.step, "saving", patiently=True)
                    self.save(wait=ends or not asynchronous)
        if self.step < steps:
            return Outcome("stopped", self.step, reason)
        return Outcome("finished", self.step, f"all {steps} steps done")

    def _one_step(self, requests: StopRequests, watchdog: Watchdog) -> tuple[StepRecord, bool]:
        train, begun = self.plan.config.train, time.perf_counter()
        watchdog.moved(self.step, "loading data")
        lr = learning_rate(self.plan.config.optim, self.step, train.steps)
        batches = [to_device(batch, self.mesh.device) for batch in self.loader.next_step()]
        drawn = time.perf_counter()
        noted = Noted(batches, lambda: watchdog.moved(self.step, "forward and backward"))
        with traffic() as sent:
            loss, tokens = self.engine.forward_backward(noted)
        differentiated = time.perf_counter()
        watchdog.moved(self.step, "optimizer")
        grad_norm = self.engine.update(lr)
        updated = time.perf_counter()
        self.step += 1
        own = drawn - begun + self.engine.seconds_before_reduction - sent.seconds_waited
        most = self._most(requests, sent.sent, own)
        if self.checkpointer.unfinished and not most["writing"]:
            self._named(self.checkpointer.finish())
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
            mfu_full=mfu(
                self.plan.compute.flops_per_token_square, rate, self.peak, self.mesh.world_size
            ),
            mfu_causal=mfu(
                self.plan.compute.flops_per_token, rate, self.peak, self.mesh.world_size
            ),
            memory_bytes=most["memory"],
            exchange_bytes={verb: most[verb] for verb in VERBS if most[verb]},
            time=StepTime(
                step=ended - begun,
                data=drawn - begun,
                forward_backward=differentiated - drawn,
                optimizer=updated - differentiated,
            ),
            wall=time.time(),
            ranks=RankTimes(
                least=-most["fastest"] / 1e6,
                most=most["slowest"] // RANKS / 1e6,
                slowest=most["slowest"] % RANKS,
            ),
        )
        return record, bool(most["stop"])

    def _most(self, requests: StopRequests, sent: Mapping[str, int], own: float) -> dict[str, int]:
        """The maximum over ranks of what each saw: one message also carries the wish to stop.

        own: seconds of work. "slowest" becomes the slowest rank's, in its upper bits, and its
        number; "fastest" the fastest's, negated; in microseconds.
        """
        micros = max(0, round(own * 1e6))
        mine = {"stop": int(requests.look()), "memory": peak_memory(self.mesh.device)}
        mine |= {"slowest": micros * RANKS + self.mesh.rank, "fastest": -micros}
        mine["writing"] = int(self.checkpointer.writing)
        mine |= {verb: sent.get(verb, 0) for verb in VERBS}
        return max_over_ranks(mine, dist.group.WORLD, torch.device("cpu"))

    def _stop_files(self) -> Sequence[Path]:
        """Rank 0 alone looks for them; the others hear of it with the step's numbers."""
        own = Path(self.plan.config.log.folder) / STOP
        return (own, *self.also_stop) if self.mesh.rank == 0 else ()

    def save(self, wait: bool = True) -> None:
        """A checkpoint of everything at the current step; all ranks call it.

        wait: until it is written; else it is finished after the first step that finds it written,
        or before the next one begins.
        """
        state = self.engine.sharded_state_dict()
        state["rng"] = sharded_random_states(self.mesh.rank, self.mesh.world_size)
        manifest = {
            "config": dump(self.plan.config),
            "plan": dict(plan_rows(self.plan)),
            "dtype": self.plan.dtype,
            "world_size": self.mesh.world_size,
            "loader": self.loader.state_dict(),
            "random_states": sorted(state["rng"]),
            "versions": versions(),
        }
        self._named(self.checkpointer.finish())
        if wait:
            self._named(self.checkpointer.save(self.step, state, manifest))
        else:
            self.checkpointer.begin(self.step, state, manifest)

    def _named(self, path: Path | None) -> None:
        """A checkpoint has got its name."""
        if path is not None:
            self.saved_step = step_of(path)
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
        same_world = manifest["world_size"] == self.mesh.world_size
        if same_world and manifest["random_states"] == names:
            state["rng"] = sharded_random_states(self.mesh.rank, self.mesh.world_size)
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


def _nothing() -> None: ...


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on `device`; document tables stay where they are read, on the CPU."""
    moved: dict[str, Any] = {
        name: getattr(batch, name).to(device, non_blocking=True)
        for name in ("tokens", "labels", "loss_mask")
    }
    return Batch(**moved, cu_seqlens=batch.cu_seqlens)
