"""The training loop: draw batches, update the weights, record each step, save checkpoints."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from lcdist.data.loader import Loader
from lcdist.distributed.mesh import Mesh
from lcdist.distributed.watchdog import ObservedSequence, Watchdog
from lcdist.engines.engine import TrainEngine
from lcdist.engines.state import load_random_states, random_states, sharded_random_states
from lcdist.exchange import traffic
from lcdist.hardware.peak import Peak, max_over_ranks
from lcdist.plan import Plan, plan_rows
from lcdist.rundir.header import versions
from lcdist.rundir.paths import step_of
from lcdist.rundir.records import StepRecord, StepTime
from lcdist.rundir.signals import STOP
from lcdist.train.bad_steps import BadSteps, refuse_non_finite
from lcdist.train.maxima import own_maxima, step_record
from lcdist.train.metrics import Metrics
from lcdist.train.profiler import StepProfiler
from lcdist.train.schedule import learning_rate
from lcdist.train.stop_requests import StopRequests, check_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """Describe how a training loop ended.

    status: "finished" or "stopped".
    step: optimizer steps taken.
    reason: a few words for status.json.
    """

    status: str
    step: int
    reason: str


class Trainer:
    """Runs steps from the current state of engine and loader until the end or a stop request.

    also_stop: files beside the run folder's own `stop` that request a stop.
    profiler: profiles some steps; off by default.
    step: steps taken, skipped ones included. saved_step: step of the newest complete checkpoint.
    bad_steps: counts steps that were skipped.
    """

    def __init__(  # noqa: PLR0913
        self,
        plan: Plan,
        mesh: Mesh,
        engine: TrainEngine,
        loader: Loader,
        checkpointer: Checkpointer,
        peak: Peak,
    ) -> None:
        self.plan, self.mesh, self.engine = plan, mesh, engine
        self.loader, self.checkpointer, self.peak = loader, checkpointer, peak
        self.also_stop: Sequence[Path] = ()
        self.profiler = StepProfiler.off(mesh.device)
        self.step = 0
        self.saved_step = 0
        folder = Path(plan.config.log.folder)
        self.bad_steps = BadSteps(plan.config.train, folder, self.complete_save)
        self._seconds_ahead = 0.0

    def train(
        self, metrics: Metrics, watchdog: Watchdog, after_first_step: Callable[[StepRecord], None]
    ) -> Outcome:
        """Run until train.steps, or until a rank receives a stop request; save before returning.

        Args:
            metrics: gets one record a step.
            watchdog: is notified of every phase of a step.
            after_first_step: called once with the first step's record, after that is written.

        Raises:
            FloatingPointError: a step is refused and not skipped, see `TrainEngine.step`; or the
                state to save is not finite.
        """
        steps, every = self.plan.config.train.steps, self.plan.config.checkpoint.every
        reason, is_first = "", True
        stops = StopRequests(self._stop_files(), alone=self.mesh.world_size == 1)
        with stops as requests, self.profiler as profiler:
            while self.step < steps and not reason:
                with profiler.step(self.step + 1):
                    record, stop_requested = self._one_step(requests, watchdog)
                metrics.write(record)
                if is_first:
                    after_first_step(record)
                    is_first = False
                if stop_requested:
                    reason = f"told to stop ({requests.reason or 'by another rank'})"
                ends = bool(reason) or self.step == steps
                was_profiled = profiler.stop_after(self.step, ends)
                if ends or (every and self.step % every == 0):
                    watchdog.record_progress(self.step, "saving", slow=True)
                    self.save(wait=ends)
                if was_profiled:
                    watchdog.record_progress(self.step, "writing the profile", slow=True)
                    profiler.write()
        if self.step < steps:
            return Outcome("stopped", self.step, reason)
        return Outcome("finished", self.step, f"all {steps} steps done")

    def _one_step(self, requests: StopRequests, watchdog: Watchdog) -> tuple[StepRecord, bool]:
        """Take one step; return its record and whether any rank received a stop request."""
        train, start = self.plan.config.train, time.perf_counter()
        watchdog.record_progress(self.step, "loading data")
        lr = learning_rate(self.plan.config.optim, self.step, train.steps)
        first_sample = self.loader.sample
        with self.profiler.phase("data"):
            batches = self.loader.next_step(self.mesh.device)
        data_end = time.perf_counter()
        observed = ObservedSequence(
            batches, lambda: watchdog.record_progress(self.step, "forward and backward")
        )
        with traffic() as sent:
            loss = self.engine.forward_backward(observed, while_waiting=self._draw_ahead)
        backward_end = time.perf_counter()
        watchdog.record_progress(self.step, "optimizer")
        with self.profiler.phase("optimizer"):
            samples = range(first_sample, self.loader.sample)
            grad_norm = self.bad_steps.update(self.engine, lr, self.step + 1, samples)
        optimizer_end = time.perf_counter()
        self.step += 1
        if grad_norm is not None:
            self.checkpointer.note_finite_step(self.step)
        work = self.engine.seconds_before_reduction
        # On a GPU the host has only queued the work by then.
        forward_backward = max(backward_end - data_end, work)
        own_work = data_end - start + self._seconds_ahead + work - sent.seconds_waited
        own = own_maxima(self.mesh, sent.sent, own_work)
        own |= {"stop": requests.poll(), "saving": int(self.checkpointer.working)}
        maxima = max_over_ranks(own, dist.group.WORLD, torch.device("cpu"))
        check_folder(maxima["stop"], self.plan.config.log.folder, self.step)
        if self.checkpointer.unfinished and not maxima["saving"]:
            self.complete_save()
        end = time.perf_counter()
        spent = StepTime(
            step=end - start,
            data=data_end - start,
            forward_backward=forward_backward,
            optimizer=optimizer_end - data_end - forward_backward,
        )
        record = step_record(
            self.plan, self.peak, self.step, self.loader.sample, loss, grad_norm, lr, maxima, spent
        )
        profiled = self.step in self.profiler.steps
        return replace(record, profiled=profiled), bool(maxima["stop"])

    def _draw_ahead(self) -> None:
        """Draw the next step's batches; note the seconds it took."""
        start = time.perf_counter()
        if self.step + 1 < self.plan.config.train.steps:
            with self.profiler.phase("data"):
                self.loader.draw_ahead(self.mesh.device)
        self._seconds_ahead = time.perf_counter() - start

    def _stop_files(self) -> Sequence[Path]:
        """Return the files to watch: on rank 0 alone, which shares what it sees every step."""
        own = Path(self.plan.config.log.folder) / STOP
        return (own, *self.also_stop) if self.mesh.rank == 0 else ()

    def save(self, wait: bool = True) -> None:
        """Save a checkpoint of the whole state at the current step; all ranks call it.

        wait: return when it is complete. Otherwise it is completed after the first step that finds
        it written and hashed, or before the next save begins.
        """
        self.complete_save()
        state = self.engine.state_dict()
        refuse_non_finite(state, self.step, Path(self.plan.config.log.folder))
        state["rng"] = sharded_random_states(self.mesh.rank, self.mesh.world_size)
        manifest = {
            "config": dump(self.plan.config),
            "plan": dict(plan_rows(self.plan)),
            "dtype": self.plan.dtype,
            "world_size": self.mesh.world_size,
            "loader": self.loader.state_dict(),
            **self.bad_steps.counts(),
            "random_states": sorted(state["rng"]),
            "versions": versions(),
        }
        if wait:
            self._note_saved(self.checkpointer.save(self.step, state, manifest))
        else:
            copy = self.plan.config.checkpoint.asynchronous
            self.checkpointer.begin(self.step, state, manifest, copy)

    def complete_save(self) -> None:
        """Wait for a save that is under way, if there is one; all ranks call it."""
        self._note_saved(self.checkpointer.finish())

    def _note_saved(self, path: Path | None) -> None:
        """Mark the checkpoint at `path` as complete and log it; do nothing for None."""
        if path is not None:
            self.saved_step = step_of(path)
            log.info("saved %s", path)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue exactly where `checkpoint` was written, on this mesh.

        Raises CheckpointError if its weights have another dtype.
        """
        manifest = checkpoint.manifest
        if manifest["dtype"] != self.plan.dtype:
            raise CheckpointError(
                f"{checkpoint.path} was trained in {manifest['dtype']}, this run in "
                f"{self.plan.dtype}: set train.dtype = '{manifest['dtype']}'"
            )
        state = self.engine.state_dict()
        names = sorted(random_states())
        same_world = manifest["world_size"] == self.mesh.world_size
        if same_world and manifest["random_states"] == names:
            state["rng"] = sharded_random_states(self.mesh.rank, self.mesh.world_size)
        loaded = load_state(checkpoint, state)
        self.bad_steps.restore(manifest)
        self.engine.load_state(loaded, checkpoint.step - self.bad_steps.skipped)
        self.loader.load_state_dict(manifest["loader"])
        if "rng" in state:
            load_random_states(loaded["rng"])
        else:
            log.info("another mesh than the checkpoint's: random states start from train.seed")
        self.step = self.saved_step = checkpoint.step

    def start_from(self, checkpoint: Checkpoint) -> None:
        """Begin a new run from the weights of `checkpoint` alone."""
        model = load_weights(checkpoint, self.engine.state_dict(weights_only=True)["model"])
        self.engine.load_state({"model": model})
