"""Measure a forward and backward pass: milliseconds, host time, launches, memory, clock and power.

Times are those of CUDA events, with the L2 cache flushed before each pass. An event's time is that
of a call: where kernels are shorter than their launch from Python, the launch is included. So the
host's time of a call and the device's own time stand beside it.
"""

import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from place import DEVICE, HAS_GPU
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# More than any GPU's L2 cache.
FLUSHED = 1 << 28
MS_A_CONTENDER, REPETITIONS = 1000.0, (3, 30)
# Passes whose host time is measured, with the device idle before each.
HOST_PASSES = 5
PASSES = ("fwd", "bwd")
TIMES = [f"{name}_{column}" for name in PASSES for column in ("ms", "spread")]
COSTS = [f"{name}_{column}" for name in PASSES for column in ("host_ms", "device_ms", "launches")]
STATE = ["sm_mhz", "watts"]
SECONDS_TO_ASK = 10.0

Run = Callable[[], Any]


@dataclass(frozen=True)
class Passes:
    """A forward pass, and the backward pass of its result, which is None if there is none."""

    forward: Run
    backward: Callable[[Any], Any] | None

    def each(self, around: Callable[[Run], Any]) -> list[Any]:
        """Return what `around` returns for each pass; it runs the pass that it is given once."""
        made: list[Any] = []

        def forward() -> Any:
            made.append(self.forward())
            return made[-1]

        found = [around(forward)]
        if self.backward is not None:
            backward = self.backward
            found.append(around(lambda: backward(made[-1])))
        return found


def measure(passes: Passes) -> dict[str, Any]:
    """Return the measured columns of a row, without rates.

    Without a GPU one pass each way is timed by the host's clock, and all else is empty.
    """
    trash = torch.empty(FLUSHED, dtype=torch.int8, device=DEVICE) if HAS_GPU else None

    def once() -> list[Callable[[], float]]:
        return passes.each(lambda run: timed(run, trash))

    if HAS_GPU:
        once()  # compiles
    peak, taken = peak_mib(once)
    least, most = REPETITIONS
    again = int(min(most, max(least, MS_A_CONTENDER / sum(taken)))) if HAS_GPU else 0
    clocks = [once() for _ in range(again)]
    # The passes are queued now, so the GPU is asked while it runs them.
    state = gpu_state() if HAS_GPU else dict.fromkeys(STATE, "")
    wait()
    runs = [[read() for read in clock] for clock in clocks] or [taken]
    figures: dict[str, Any] = {"runs": len(runs), "peak_mib": peak, **state}
    for name, column in zip(PASSES, zip(*runs, strict=True), strict=False):
        figures[f"{name}_ms"] = median(column)
        figures[f"{name}_spread"] = round((max(column) - min(column)) / median(column), 3)
    return figures | (costs(passes) if HAS_GPU else dict.fromkeys(COSTS, ""))


def timed(run: Run, trash: Tensor | None) -> Callable[[], float]:
    """Run once; return a function that gives the milliseconds after `wait`."""
    if trash is None:
        taken = host_ms(run)
        return lambda: taken
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    trash.zero_()
    start.record()
    run()
    stop.record()
    return lambda: start.elapsed_time(stop)


def host_ms(run: Run) -> float:
    """Return the milliseconds until the call returns, with an idle device before it."""
    wait()
    begun = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begun)


def costs(passes: Passes) -> dict[str, Any]:
    """Return host time, device time and launches of each pass."""
    found = [passes.each(host_ms) for _ in range(HOST_PASSES)]
    host = [median(column) for column in zip(*found, strict=True)]
    device = passes.each(kernels_of)
    figures: dict[str, Any] = dict.fromkeys(COSTS, "")
    for name, on_host, (ms, launches) in zip(PASSES, host, device, strict=False):
        figures[f"{name}_host_ms"] = round(on_host, 4)
        figures[f"{name}_device_ms"] = round(ms, 4)
        figures[f"{name}_launches"] = launches
    return figures


def kernels_of(run: Run) -> tuple[float, int]:
    """Return the milliseconds during which the device ran kernels or copies, and their number."""
    wait()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        wait()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in seen.events() or ()
        if event.device_type.name == "CUDA"
    ]
    return covered(spans) / 1e3, len(spans)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    ordered = sorted(spans)
    reached = [float("-inf")]
    for _, stop in ordered:
        reached.append(max(reached[-1], stop))
    edges = zip(ordered, pairwise(reached), strict=True)
    return sum(max(0.0, now - max(start, before)) for (start, _), (before, now) in edges)


def gpu_state() -> dict[str, Any]:
    """Return the GPU's SM clock in MHz and its power in watts, empty where the driver is silent."""
    uuid = f"GPU-{torch.cuda.get_device_properties(DEVICE).uuid}"
    words = ["nvidia-smi", f"--id={uuid}", "--query-gpu=clocks.sm,power.draw"]
    words += ["--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=SECONDS_TO_ASK, check=True
        )
        return read_state(done.stdout)
    return dict.fromkeys(STATE, "")


def read_state(text: str) -> dict[str, Any]:
    """Parse a line of nvidia-smi into the columns of STATE."""
    cells = [cell.strip() for cell in text.strip().split(",")]
    if len(cells) != len(STATE):
        return dict.fromkeys(STATE, "")
    return {key: cell if is_number(cell) else "" for key, cell in zip(STATE, cells, strict=True)}


def is_number(text: str) -> bool:
    """Return whether the text is a number; nvidia-smi writes [N/A] for what it does not know."""
    return text.replace(".", "", 1).isdigit()


def peak_mib(once: Callable[[], Sequence[Callable[[], float]]]) -> tuple[float | str, list[float]]:
    """Return the peak MiB of a run beyond present memory (GPU only), and its milliseconds."""
    if not HAS_GPU:
        return "", [read() for read in once()]
    wait()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    clock = once()
    wait()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return round(peak, 1), [read() for read in clock]


def wait() -> None:
    """Wait until the GPU has finished all work."""
    if HAS_GPU:
        torch.cuda.synchronize()
