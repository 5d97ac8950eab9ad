"""Read and write the tables of a profile: kernels by place, and memory at its peak by place.

The profile of steps 5 to 7 on rank 0 is the folder `profile/steps_5-7_rank_0` of the run:

- `trace.json.gz`: the trace in Chrome's format, for chrome://tracing or ui.perfetto.dev.
- `kernels.json`: the table that `Profile` holds; `kernels.txt`: the same as text.
- `memory.pickle`: on CUDA, the allocator's snapshot, for pytorch.org/memory_viz.
"""

import json
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lcdist.utils.json_file import check_types, read_json

PROFILE_FOLDER = "profile"
TABLE_FILE = "kernels.json"
TEXT_FILE = "kernels.txt"
TRACE_FILE = "trace.json.gz"
SNAPSHOT_FILE = "memory.pickle"


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """Work of one kind at one place, as sums over the profiled steps.

    Attributes:
        phase: forward, backward, optimizer or other. Recomputation belongs to backward.
        place: module and autograd Function, with `*` for layer numbers.
        operation: the operation called at this place, "" for a kernel that is launched directly.
        kernel: the kernel on the device; "" on a CPU.
        launches: kernels launched, on a CPU operations called.
        ms: time on the device; on a CPU the operation's own time.
        bytes: memory allocated.
    """

    phase: str
    place: str
    operation: str
    kernel: str
    launches: int
    ms: float
    bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """Bytes that a phase and place had allocated at the peak, in `count` allocations."""

    phase: str
    place: str
    bytes: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Tables of some steps on one rank.

    Attributes:
        first: first step, from 1.
        last: last step.
        rank: the rank that was profiled.
        device: "cuda" or "cpu".
        step_ms: mean time of a step, with the profiler's own work in it.
        rows: work by place, the longest first.
        peak_bytes: most memory allocated at once on the device.
        before_bytes: memory at the peak that was allocated before the first profiled step.
        memory: memory at the peak by place, the largest first.
    """

    first: int
    last: int
    rank: int
    device: str
    step_ms: float
    rows: Sequence[KernelRow]
    peak_bytes: int
    before_bytes: int
    memory: Sequence[MemoryRow]

    @property
    def steps(self) -> int:
        """Return the number of profiled steps."""
        return self.last - self.first + 1

    @property
    def ms(self) -> float:
        """Return the time of all rows in ms a step."""
        return sum(row.ms for row in self.rows) / self.steps


def profile_name(first: int, last: int, rank: int) -> str:
    """Return the name of a profile's folder."""
    return f"steps_{first}-{last}_rank_{rank}" if last > first else f"step_{first}_rank_{rank}"


def write_profile(folder: Path, profile: Profile) -> None:
    """Write the profile's table into its folder, as JSON and as text."""
    (folder / TABLE_FILE).write_text(json.dumps(asdict(profile), indent=1) + "\n", encoding="utf-8")
    (folder / TEXT_FILE).write_text(profile_text(profile), encoding="utf-8")


def read_profiles(run_folder: Path) -> list[Profile]:
    """Return the profiles of a run by step and rank.

    Raises:
        ValueError: a table is damaged; the message names the file.
    """
    files = (run_folder / PROFILE_FOLDER).glob(f"step*/{TABLE_FILE}")
    profiles = [_read_profile(file) for file in files]
    return sorted(profiles, key=lambda each: (each.first, each.last, each.rank))


def _read_profile(file: Path) -> Profile:
    where = f"{file}: not the table of a profile"
    hints = typing.get_type_hints(Profile) | {"rows": list[dict], "memory": list[dict]}
    table = read_json(file)
    check_types(table, hints, where)
    for kind, rows in ((KernelRow, table["rows"]), (MemoryRow, table["memory"])):
        for row in rows:
            check_types(row, typing.get_type_hints(kind), where)
    try:
        table["rows"] = [KernelRow(**row) for row in table["rows"]]
        table["memory"] = [MemoryRow(**row) for row in table["memory"]]
        return Profile(**table)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


KERNEL_HEAD = ("phase", "place", "operation or kernel", "launches", "ms", "share", "MiB")
MEMORY_HEAD = ("phase", "place", "allocations", "MiB", "share")


def kernel_cells(profile: Profile, most: int | None = None) -> list[tuple[str, ...]]:
    """Return the cells of the table of kernels, a step's mean; the last row sums up the rest.

    most: rows at most; None: all of them.
    """
    rows = list(profile.rows)
    shown, rest = (rows, []) if most is None else (rows[:most], rows[most:])
    cells = [_kernel_row(profile, row) for row in shown]
    if rest:
        total = KernelRow(
            phase="",
            place="",
            operation=f"{len(rest):,} more rows",
            kernel="",
            launches=sum(row.launches for row in rest),
            ms=sum(row.ms for row in rest),
            bytes=sum(row.bytes for row in rest),
        )
        cells.append(_kernel_row(profile, total))
    return cells


def _kernel_row(profile: Profile, row: KernelRow) -> tuple[str, ...]:
    name = ": ".join(part for part in (row.operation, short_kernel(row.kernel)) if part)
    share = row.ms / profile.steps / profile.ms if profile.ms else 0.0
    return (
        row.phase,
        row.place,
        name,
        f"{row.launches / profile.steps:,.4g}",
        f"{row.ms / profile.steps:.3f}",
        f"{share:.1%}",
        f"{row.bytes / profile.steps / 2**20:,.1f}",
    )


def memory_cells(profile: Profile, most: int | None = None) -> list[tuple[str, ...]]:
    """Return the cells of the table of memory at the peak; `most` as in `kernel_cells`."""
    rows = list(profile.memory)
    if most is not None and len(rows) > most:
        rest = rows[most:]
        size, count = sum(row.bytes for row in rest), sum(row.count for row in rest)
        more = MemoryRow(phase="", place=f"{len(rest):,} more places", bytes=size, count=count)
        rows = [*rows[:most], more]
    cells = [(row.phase, row.place, f"{row.count:,}", row.bytes) for row in rows]
    if profile.before_bytes:
        cells.append(("", "allocated before", "", profile.before_bytes))
    peak = max(1, profile.peak_bytes)
    return [(*words, f"{size / 2**20:,.1f}", f"{size / peak:.1%}") for *words, size in cells]


# Words of C++ names that tell kernels apart less than the rest.
_NOISE = ("void ", "at::native::", "(anonymous namespace)::", "at::", "c10::", "std::")
KERNEL_WIDTH = 60


def short_kernel(name: str) -> str:
    """Return a kernel's name without C++ namespaces, in at most KERNEL_WIDTH characters."""
    for word in _NOISE:
        name = name.replace(word, "")
    return name if len(name) <= KERNEL_WIDTH else name[: KERNEL_WIDTH - 1] + "…"


def profile_title(profile: Profile) -> str:
    """Return which steps on which rank a profile holds, and their time."""
    steps = f"step {profile.first}"
    if profile.steps > 1:
        steps = f"steps {profile.first} to {profile.last}, mean of a step"
    work = "kernels" if profile.device == "cuda" else "operations"
    return (
        f"rank {profile.rank}, {steps}: {profile.ms:,.1f} ms of {work} in {profile.step_ms:,.1f} ms"
    )


def profile_text(profile: Profile) -> str:
    """Return both tables as text with aligned columns."""
    peak = f"memory at its peak of {profile.peak_bytes / 2**20:,.1f} MiB, by place"
    return "\n\n".join(
        (
            profile_title(profile),
            _aligned(KERNEL_HEAD, kernel_cells(profile), words=3),
            peak,
            _aligned(MEMORY_HEAD, memory_cells(profile), words=2) + "\n",
        )
    )


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """Return a table as text; the first `words` columns are left aligned, the others right."""
    table = [tuple(head), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    return "\n".join(lines)
