"""All that only a GPU can show, in one command and without network, written down as it comes.

    python kernels/bench/gpu_check.py [--out FOLDER] [--minutes 9]

1. tests.xml, tests.log: every kernel test on the GPU. 2. ranks.csv: rings of 2 to 64 virtual ranks
in bf16, and how far they are from float64. 3. kernels.csv: time and memory of every method that has
kernels, beside the libraries that are there. 4. training.csv: a few steps of each debug config,
where megatron-core is importable. Steps 1 to 3 need torch, triton, numpy and pytest alone. A step
that runs out of time keeps what it has. summary.json says what was run, what failed and what not.

Without a GPU the same lines run on the CPU, at sizes that take seconds, and say so.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton  # noqa: E402
from gpu_contenders import Contender, contenders, sizes  # noqa: E402
from torch import Tensor  # noqa: E402

from lcdist.attention import METHODS  # noqa: E402
from lcdist.exchange import VirtualGroup, group_rank  # noqa: E402
from lcdist.layout import ContextLayout  # noqa: E402
from lcdist_kernels import full_reference  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
NEEDED_TO_TRAIN = ("megatron.core", "psutil", "sentencepiece", "tensorboard", "rich", "matplotlib")
# What a kernel or a library that meets a GPU for the first time may end in; the next step goes on.
FAILURES = (
    *(RuntimeError, ValueError, ArithmeticError, TypeError, AttributeError, LookupError),
    *(ImportError, OSError, AssertionError, MemoryError, subprocess.SubprocessError),
    triton.errors.TritonError,
)
# Shares of the time that is left when a step begins.
SHARES = {"tests": 0.45, "ranks": 0.15, "kernels": 0.75, "training": 1.0}


class Check:
    """The folder of results and the clock."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self.end = folder, time.monotonic() + 60 * minutes
        self.summary: dict[str, Any] = {"device": device_name(), "steps": {}}
        folder.mkdir(parents=True, exist_ok=True)
        self.note("versions", {"torch": torch.__version__, "triton": triton.__version__})

    @property
    def left(self) -> float:
        """Seconds to go."""
        return max(0.0, self.end - time.monotonic())

    def note(self, key: str, value: Any) -> None:
        """Writes one entry of the summary at once."""
        self.summary[key] = value
        text = json.dumps(self.summary, indent=1)
        (self.folder / "summary.json").write_text(text + "\n", encoding="utf-8")

    def step(self, name: str, run: Callable[["Check", float], str]) -> None:
        """Runs a step within its share of the time; a failure is noted and the next one begins."""
        begun, seconds = time.monotonic(), self.left * SHARES[name]
        try:
            said = run(self, time.monotonic() + seconds)
        except FAILURES:
            said = f"failed: {traceback.format_exc()}"
        taken = round(time.monotonic() - begun, 1)
        print(f"{name} ({taken} s): {said}", flush=True)
        self.note("steps", self.summary["steps"] | {name: {"said": said, "seconds": taken}})

    def rows(self, name: str, rows: Iterator[dict[str, Any]], end: float) -> str:
        """Writes rows to <name>.csv one by one until they are done or time is up."""
        count = 0
        with (self.folder / f"{name}.csv").open("w", newline="") as file:
            writer = None
            for row in rows:
                writer = writer or csv.DictWriter(file, list(row))
                if not count:
                    writer.writeheader()
                writer.writerow(row)
                file.flush()
                count += 1
                if time.monotonic() > end:
                    return f"{count} rows, then time was up"
        return f"{count} rows, complete"


def device_name() -> str:
    """The GPU's name; without one, says that nothing here was measured on a GPU."""
    return torch.cuda.get_device_name() if HAS_GPU else "no GPU: a trial of the lines on a CPU"


def kernel_tests(check: Check, end: float) -> str:
    """Every test of the kernels; on a CPU one quick file of them."""
    chosen = ["tests/kernels"] if HAS_GPU else ["tests/kernels/test_bands.py"]
    words = [sys.executable, "-m", "pytest", *chosen, "-p", "no:cacheprovider"]
    words += [f"--junitxml={check.folder / 'tests.xml'}", "-m", "not multi_gpu"]
    with (check.folder / "tests.log").open("w") as log:
        seconds = max(10.0, end - time.monotonic())
        done = subprocess.run(words, cwd=ROOT, stdout=log, stderr=log, timeout=seconds, check=False)
    last = (check.folder / "tests.log").read_text().strip().splitlines()[-1:]
    return f"exit status {done.returncode}; {' '.join(last)}"


def virtual_ranks(check: Check, end: float) -> str:
    """Rings of virtual ranks against float64."""
    return check.rows("ranks", ranks_rows(), end)


def ranks_rows() -> Iterator[dict[str, Any]]:
    """Relative errors of out and of dq for every method with kernels, per number of ranks."""
    seqlen, head_dim = (8192, 64) if HAS_GPU else (512, 16)
    dtype = torch.bfloat16 if HAS_GPU else torch.float32
    made = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, seqlen, 4, head_dim, generator=made, dtype=dtype) for _ in range(4)]
    q, k, v, dout = (x.to(DEVICE) for x in whole)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = full_reference(*leaves)
    truth = [out.detach(), torch.autograd.grad(out, leaves, dout.double())[0]]
    for cp_size in (2, 8, 64) if HAS_GPU else (2, 4):
        layout = ContextLayout("zigzag", seqlen, cp_size)

        def one(rank: Any, layout: ContextLayout = layout) -> list[Tensor]:
            number = group_rank(rank)
            mine = [layout.shard(x, number, 1).requires_grad_() for x in (q, k, v)]
            options = METHODS["full"].options()
            out = METHODS["full"].attention(
                *mine, options=options, layout=layout, group=rank, impl="triton"
            )
            dq = torch.autograd.grad(out, mine, layout.shard(dout, number, 1))[0]
            return [out.detach(), dq]

        parts = zip(*VirtualGroup(cp_size).run(one), strict=True)
        got = [layout.unshard(list(part), 1).double() for part in parts]
        errors = [((g - t).norm() / t.norm()).item() for g, t in zip(got, truth, strict=True)]
        row = {"method": "full", "cp_size": cp_size, "seqlen": seqlen, "dtype": str(dtype)}
        yield row | {"out": f"{errors[0]:.3g}", "dq": f"{errors[1]:.3g}"}


def kernel_rates(check: Check, end: float) -> str:
    """Time and memory of kernels and libraries, the correctness gate first."""
    return check.rows("kernels", kernel_rows(end), end)


def kernel_rows(end: float) -> Iterator[dict[str, Any]]:
    """A row per size and contender; what fails is a row that says why."""
    for size in sizes(HAS_GPU):
        for contender in contenders(size, DEVICE):
            if time.monotonic() > end:
                return
            yield {"device": device_name(), **size.facts(), **rate_of(contender)}
            if HAS_GPU:
                torch.cuda.empty_cache()


def rate_of(contender: Contender) -> dict[str, Any]:
    """Its medians, or why there are none."""
    row = {"contender": contender.name, "fwd_ms": "", "bwd_ms": "", "fwd_tflops": ""}
    row |= {"bwd_tflops": "", "extra_mib": "", "note": ""}
    try:
        return row | contender.measure()
    except FAILURES as error:
        return row | {"note": f"{type(error).__name__}: {error}".replace("\n", " ")[:300]}


def trainings(check: Check, end: float) -> str:
    """A few steps of each debug configuration on this machine's first GPU."""
    missing = [name for name in NEEDED_TO_TRAIN if find_spec(name.partition(".")[0]) is None]
    if missing:
        return f"not run: {', '.join(missing)} not importable"
    configs = sorted((ROOT / "configs" / "debug").glob("*.toml"))
    return check.rows("training", training_rows(check, configs, end), end)


def training_rows(check: Check, configs: list[Path], end: float) -> Iterator[dict[str, Any]]:
    """One row a configuration: the last loss, or the last line it said."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    for config in configs if HAS_GPU else configs[:1]:
        folder = check.folder / "runs" / config.stem
        words = [sys.executable, "-m", "lcdist", "train", str(config), f"log.folder={folder}"]
        words += ["train.steps=20" if HAS_GPU else "train.steps=5", "log.peak_tflops=1.0"]
        seconds = max(10.0, end - time.monotonic())
        done = subprocess.run(
            words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
        metrics = folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
        said = (done.stdout + done.stderr).strip().splitlines()[-1:]
        yield {
            "config": config.stem,
            "status": done.returncode,
            "first_loss": losses[0] if losses else "",
            "last_loss": losses[-1] if losses else "",
            "said": "" if done.returncode == 0 else " ".join(said)[:300],
        }


def main() -> int:
    """All steps; 0 where none failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", default=str(ROOT / "gpu-check"), help="folder of results")
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything")
    arguments = parser.parse_args()
    check = Check(Path(arguments.out), arguments.minutes)
    print(f"{device_name()}; results in {check.folder}", flush=True)
    steps = {"tests": kernel_tests, "ranks": virtual_ranks}
    steps |= {"kernels": kernel_rates, "training": trainings}
    for name, run in steps.items():
        check.step(name, run)
    said = [step["said"] for step in check.summary["steps"].values()]
    return int(any(text.startswith(("failed", "exit status 1")) for text in said))


if __name__ == "__main__":
    sys.exit(main())
