"""CPU time of starting each command: how long a user waits before anything happens.

    python kernels/bench/bench_startup.py [--runs 5]

Adds one row per command to results/startup.csv: the smallest CPU time (user and system) of several
runs, in seconds. CPU time does not depend on how busy the machine is.
"""

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from harness import commit, machine, write

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    "--help",
    "--version",
    "status --help",
    "report --help",
    "methods",
    "plan configs/debug/full.toml",
    "train --help",
    "convert --help",
)


def cpu_seconds(words: Sequence[str]) -> float:
    """Return the user and system time of one run of `python -m lcdist`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "lcdist", *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Time every command, print the times, and add them to the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="runs of each command")
    runs = parser.parse_args().runs
    rows: list[dict[str, object]] = []
    for command in COMMANDS:
        # The first run reads the files into the page cache, and is counted like the others.
        seconds = min(cpu_seconds(command.split()) for _ in range(runs))
        print(f"{command:30} {seconds:.2f} s", flush=True)
        rows.append(
            {
                "date": date.today().isoformat(),
                "commit": commit(),
                "device": machine(),
                "command": command,
                "runs": runs,
                "cpu_s": round(seconds, 3),
            }
        )
    write("startup", rows)


if __name__ == "__main__":
    main()
