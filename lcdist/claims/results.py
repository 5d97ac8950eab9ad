"""Read what the jobs of a folder have measured, and with which machine and commit."""

import math
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from lcdist.claims.claim import Figure, Measured, Reading, Training
from lcdist.claims.jobs import Job
from lcdist.claims.profiles import Profile
from lcdist.claims.text import REAL
from lcdist.config.schema import Config
from lcdist.data.datasets.split import TokenSplit
from lcdist.rundir.header import versions
from lcdist.rundir.paths import METRICS_FILE
from lcdist.rundir.records import StepRecord, read_records
from lcdist.utils.json_file import read_object

READ = "read"
TEXT = "text"
COSTS = "cost.json"
# Points of a loss curve.
_POINTS = 60


def reading_file(folder: Path, name: str) -> Path:
    """Return the file of a finished reading."""
    return folder / READ / f"{name}.json"


def read_measured(folder: Path, profile: Profile, config: Config, jobs: Sequence[Job]) -> Measured:
    """Return all that finished jobs in a folder have measured."""
    length = config.train.seqlen
    readings = {
        read.name: reading_of(read_object(file, {"measured": dict}), length)
        for job in jobs
        for read in job.reads
        if (file := reading_file(folder, read.name)).exists()
    }
    trainings = {
        job.name: training_of(folder / job.name) for job in jobs if is_trained(folder / job.name)
    }
    unigram = unigram_perplexity(folder / TEXT / REAL) if readings else math.inf
    return Measured(length, unigram, profile.decides, readings, trainings)


def is_trained(folder: Path) -> bool:
    """Return whether the training of a job has finished: its costs were written."""
    return (folder / COSTS).exists()


def run_folders(folder: Path) -> list[Path]:
    """Return the run folders of a job, one for each of its stages, in their order."""
    stages = [path.parent for path in folder.glob(f"*/{METRICS_FILE}")]
    return sorted(stages, key=lambda path: int(path.name.partition("-")[0])) or [folder]


def reading_of(table: Mapping[str, Any], length: int) -> Reading:
    """Return the reading that a file of results holds.

    Args:
        table: its content.
        length: tokens at which the model was trained.
    """
    found = table["measured"]
    perplexity = found["perplexity"]
    columns = ("lengths", "perplexity", "interval", "stretches")
    rows = [row for row in zip(*map(perplexity.get, columns), strict=True) if row[1] is not None]
    passkey = found.get("passkey", {"lengths": [], "accuracy": [], "interval": []})
    tasks = zip(passkey["lengths"], passkey["accuracy"], passkey["interval"], strict=True)
    return Reading(
        {at: _figure(value, ends) for at, value, ends, _ in rows},
        {at: _figure(value, ends) for at, value, ends in tasks},
        {int(at): share for at, share in table.get("shares", {}).items()},
        {at: [(tokens, nats) for tokens, nats in pieces] for at, _, _, pieces in rows},
    )


def _figure(value: float, ends: Sequence[float] | None) -> Figure:
    return Figure(value, (ends[0], ends[1]) if ends else None)


def training_of(folder: Path) -> Training:
    """Return how the training of a job went, over all its stages."""
    records = [r for run in run_folders(folder) for r in read_records(run / METRICS_FILE)]
    flops = read_object(folder / COSTS, {"flops": float})["flops"]
    return Training(tuple(_curve(records)), sum(r.time.step for r in records), flops)


def _curve(records: Sequence[StepRecord]) -> Iterator[tuple[int, float]]:
    """Yield (tokens, loss) averaged over equally many steps each."""
    tokens, size = 0, max(1, len(records) // _POINTS)
    for start in range(0, len(records), size):
        group = records[start : start + size]
        tokens += sum(record.tokens for record in group)
        yield tokens, sum(record.loss for record in group) / len(group)


def unigram_perplexity(folder: Path) -> float:
    """Return exp of the entropy of the held-out tokens' frequencies."""
    split = TokenSplit(folder, "valid")
    tokens = np.concatenate([np.asarray(split.document(n)) for n in range(split.num_documents)])
    shares = np.bincount(tokens) / len(tokens)
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def facts(command: str, seed: int, root: Path) -> dict[str, str]:
    """Return command, seed, commit, machine, versions and date.

    Args:
        command: that makes the results.
        seed: of the trainings.
        root: folder of the sources.
    """
    known = versions()
    return {
        "command": command,
        "seed": str(seed),
        "commit": _commit(root),
        "machine": _machine(),
        "versions": ", ".join(f"{name} {version}" for name, version in known.items()),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _commit(root: Path) -> str:
    """Return the commit of the sources, and whether they differ from it; "unknown" without git."""
    try:
        words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next(
            (x.partition(":")[2].strip() for x in lines if x.startswith("model name")), name
        )
    memory = psutil.virtual_memory().total / 2**30
    return f"{name}, {psutil.cpu_count()} cores, {memory:.0f} GiB"
