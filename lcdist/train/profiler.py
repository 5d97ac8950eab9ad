"""Profile some steps of a run: a trace, a table of kernels by place, and a memory snapshot."""

import contextlib
import gzip
import json
import logging
import pickle
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from lcdist.hardware.device import wait_for_device
from lcdist.rundir.profile import (
    PROFILE_FOLDER,
    SNAPSHOT_FILE,
    TRACE_FILE,
    profile_name,
    profile_title,
    write_profile,
)
from lcdist.train.profile_tables import profile_of
from lcdist.train.trace_places import MODULE, PHASE, STEP
from lcdist.utils.atomic import atomic_folder, replace_folder

log = logging.getLogger(__name__)
# The snapshot keeps this many of the last allocations and frees, some KiB each.
SNAPSHOT_EVENTS = 200_000


class StepProfiler:
    """Context manager that profiles `steps` on one rank; leaving it discards what is unwritten.

    Without steps, and on other ranks, it does nothing. Numbers of the profiled steps do not change:
    hooks on modules only open ranges in the trace.

    Args:
        run_folder: folder of the run.
        steps: numbers of the steps to profile, from 1, without a gap.
        is_profiled: whether this rank is profiled.
        rank: the rank that is profiled.
        device: device of this rank.
        models: this rank's model chunks.
    """

    def __init__(  # noqa: PLR0913
        self,
        run_folder: Path,
        steps: range,
        *,
        is_profiled: bool,
        rank: int,
        device: torch.device,
        models: Sequence[nn.Module],
    ) -> None:
        self.run_folder, self.steps, self.rank = run_folder, steps, rank
        self.device, self.models = device, models
        self._own_steps = steps if is_profiled else range(0)
        self._taken: list[int] = []
        self._trace: profile | None = None
        self._is_running = False
        self._hooks: list[Any] = []
        self._snapshot: Any = None

    @classmethod
    def off(cls, device: torch.device) -> "StepProfiler":
        """Return a profiler that does nothing."""
        steps = range(0)
        return cls(Path(), steps, is_profiled=False, rank=0, device=device, models=())

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile the block if it is a step to profile on this rank."""
        if number not in self._own_steps:
            yield
            return
        if self._trace is None:
            self._start()
        with record_function(f"{STEP}{number}"):
            yield
        self._taken.append(number)

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Return a context that marks a part of the step in the trace."""
        return record_function(PHASE + name) if self._is_running else contextlib.nullcontext()

    def stop_after(self, step: int, run_ends: bool) -> bool:
        """Stop if `step` was the last to profile; return whether to `write`, on every rank."""
        if step not in self.steps or not (run_ends or step == self.steps[-1]):
            return False
        self._stop()
        return True

    def write(self) -> None:
        """Write the profile on its rank, while the other ranks wait; all ranks call it.

        A profile that cannot be written is reported, and the run continues.
        """
        if self._trace is not None:
            try:
                self._write(self._trace)
            except Exception as error:
                log.error("the profile is lost, the run continues: %s", error)
        self._trace, self._snapshot, self._taken = None, None, []
        # Without it the others would wait in the next step, which their watchdogs think is short.
        dist.all_reduce(torch.zeros(1))

    def _start(self) -> None:
        wait_for_device(self.device)
        wanted = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            wanted.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS, stacks="python")
        self._hooks = [hook for model in self.models for hook in _open_ranges(model)]
        self._trace, self._is_running = profile(activities=wanted, profile_memory=True), True
        self._trace.start()

    def _stop(self) -> None:
        if not self._is_running:
            return
        assert self._trace is not None
        self._is_running = False
        self._trace.stop()
        for hook in self._hooks:
            hook.remove()
        if self.device.type == "cuda":
            self._snapshot = torch.cuda.memory._snapshot()
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, trace: profile) -> None:
        first, last = self._taken[0], self._taken[-1]
        folder = self.run_folder / PROFILE_FOLDER / profile_name(first, last, self.rank)
        new = folder.with_name(f".new-{folder.name}")
        shutil.rmtree(new, ignore_errors=True)
        with atomic_folder(new) as partial:
            raw = partial / "trace.json"
            trace.export_chrome_trace(str(raw))
            text = raw.read_bytes()
            raw.unlink()
            (partial / TRACE_FILE).write_bytes(gzip.compress(text, compresslevel=5, mtime=0))
            if self._snapshot is not None:
                (partial / SNAPSHOT_FILE).write_bytes(pickle.dumps(self._snapshot))
            tables = profile_of(
                json.loads(text)["traceEvents"],
                first=first,
                last=last,
                rank=self.rank,
                device=self.device.type,
            )
            write_profile(partial, tables)
        replace_folder(new, folder, folder.with_name(f".old-{folder.name}"))
        log.info("wrote %s: %s", folder, profile_title(tables))


def _open_ranges(model: nn.Module) -> list[Any]:
    """Let the forward of every module open a range of its name in the trace; return the hooks."""
    hooks: list[Any] = []
    for name, module in model.named_modules():
        marker = _ModuleRange(name or "model")
        hooks.append(module.register_forward_pre_hook(marker.enter))
        hooks.append(module.register_forward_hook(marker.leave, always_call=True))
    return hooks


class _ModuleRange:
    """Hooks that open and close a range around a module's forward, also a nested one."""

    def __init__(self, name: str) -> None:
        self._name = MODULE + name
        self._open: list[record_function] = []

    def enter(self, *_: Any) -> None:
        marker = record_function(self._name)
        marker.__enter__()
        self._open.append(marker)

    def leave(self, *_: Any) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)
