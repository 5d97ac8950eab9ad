"""Run `make bench`: the kernel benchmarks and plots on a GPU, the CPU benchmarks elsewhere.

Each script is a process of its own. If one fails, the next still runs.
"""

import subprocess
import sys
from pathlib import Path

from goals import METHODS, table
from harness import RESULTS
from place import HAS_GPU, device_name

ON_GPU = [*(f"bench_{method}.py" for method in METHODS), "plot.py"]
ON_CPU = ["bench_methods.py", "bench_training.py", "bench_loss.py", "bench_memory.py"]


def main() -> int:
    """Run all scripts and return the number that failed."""
    here, failed = Path(__file__).parent, 0
    for script in ON_GPU if HAS_GPU else ON_CPU:
        print(f"--- {script}", flush=True)
        failed += bool(subprocess.run([sys.executable, str(here / script)], check=False).returncode)
    if HAS_GPU:
        print(table(RESULTS, device_name()))
    return failed


if __name__ == "__main__":
    sys.exit(main())
