"""Benchmark checkpoints: a save with digests beside one without, and the parts of a resumption.

    python kernels/bench/bench_save.py [--quick]

Synchronous saves with and without digests take turns, each in a new folder, of a model with its
optimizer state. Three times are measured: of a save within a run, where training waits for the
writes; of such a save and the next steps, beside which the files are hashed; and of the save that
ends a run, which waits for the digests. Then a run of the same model is resumed in a process of its
own, and the parts of its start are timed. Rows are added to results/save.csv.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import commit, machine, write

from lcdist.checkpoint import manifest, save, writer
from lcdist.checkpoint.save import Checkpointer
from lcdist.commands import train
from lcdist.config import load
from lcdist.config.schema import Config
from lcdist.distributed.mesh import build_mesh, end_world, start_world
from lcdist.hardware.peak import Peak
from lcdist.plan import make_plan
from lcdist.train.build import build_trainer, open_dataset
from lcdist.train.trainer import Trainer
from lcdist.utils.digests import HashingWriter

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/debug/full.toml"
# 125 million parameters: 1.5 GB of weights and moments in fp32.
SIZES = {
    "whole": ["model.num_layers=12", "model.hidden_size=768", "model.ffn_hidden_size=2048"],
    "quick": ["model.num_layers=2", "model.hidden_size=256", "model.ffn_hidden_size=512"],
}
HEADS = ["model.nheads=12", "model.nheads_kv=4", "model.vocab_size=32000"]
QUICK_HEADS = ["model.nheads=4", "model.nheads_kv=4", "model.vocab_size=2000"]
# Steps that take longer than hashing a checkpoint.
STEPS_BESIDE = 3
# Functions that `lcdist.commands.train.run` calls, in order.
PARTS = {
    "plan": "make_plan",
    "join the world": "start_world",
    "mesh": "build_mesh",
    "open data": "open_dataset",
    "find and verify checkpoint": "choose_start",
    "checks": "check_start",
    "measure the device": "device_peak",
    "build model and optimizer": "build_trainer",
    "load weights and moments": "restore_weights",
}


def settings(quick: bool, folder: str) -> list[str]:
    """Return the overrides of a run of one step a start."""
    size = [*SIZES["quick" if quick else "whole"], *(QUICK_HEADS if quick else HEADS)]
    run = [
        "train.seqlen=64",
        "train.global_batch_size=1",
        "checkpoint.keep_last=1",
        "optim.warmup_steps=0",
    ]
    return [*size, *run, f"log.folder={folder}", "log.peak_tflops=1", "log.tensorboard=false"]


class WithoutDigests(HashingWriter):
    """Writes as it is told and hashes nothing."""

    def write(self, data: Any) -> int:
        """Write only."""
        return self._stream.write(data)

    def digest(self) -> str:
        """Return a text of the same length."""
        self._thread.shutdown()
        return "0" * 64


def save_rows(config: Config, repeats: int) -> list[dict[str, object]]:
    """Return rows of saves with digests and of saves without.

    The ratio of a row adds what digests cost there to the time of a save without.
    """
    plan = make_plan(config, 1)
    start_world(config.parallel.timeout)
    mesh = build_mesh(config.parallel, config.train.seed)
    trainer = build_trainer(plan, mesh, open_dataset(plan), Peak(1.0, "config"))
    times: dict[tuple[str, str], list[float]] = {}
    nbytes = 0
    real = writer.HashingWriter, manifest.sha256_of_all
    for number in range(repeats + 1):
        for kind in ("with digests", "without"):
            if kind == "without":
                writer.HashingWriter = WithoutDigests  # type: ignore[misc]
                save.sha256_of_all = manifest.sha256_of_all = without_digests
            with tempfile.TemporaryDirectory(dir=config.log.folder) as folder:
                found = time_saves(trainer, Path(folder), 2 * number + 1)
                nbytes = sum(p.stat().st_size for p in Path(folder).rglob("*.distcp"))
            writer.HashingWriter, manifest.sha256_of_all = real  # type: ignore[misc]
            save.sha256_of_all = manifest.sha256_of_all
            # The first pass fills caches and is not counted.
            for part, seconds in found.items():
                times.setdefault((part, kind), []).extend([seconds] * (number > 0))
    medians = {key: median(seconds) for key, seconds in times.items()}
    alone = medians["save", "without"]
    ratios = {
        (part, kind): 1 + (seconds - medians[part, "without"]) / alone
        for (part, kind), seconds in medians.items()
    }
    return [
        row(part, kind, seconds, nbytes, repeats, ratios[part, kind])
        for (part, kind), seconds in medians.items()
    ]


def time_saves(trainer: Trainer, folder: Path, step: int) -> dict[str, float]:
    """Return the seconds of a save within a run, of one with the next steps, and of a last one."""
    trainer.checkpointer, trainer.step = Checkpointer(folder, keep_last=1), step
    began = time.perf_counter()
    trainer.save(wait=False)
    waited = time.perf_counter() - began
    for _ in range(STEPS_BESIDE):
        trainer.engine.forward_backward(trainer.loader.next_step(trainer.mesh.device))
        trainer.engine.step(1e-4)
    hashed = not trainer.checkpointer.working
    stepped = time.perf_counter()
    trainer.complete_save()
    done = time.perf_counter()
    if not hashed:
        raise RuntimeError(f"{STEPS_BESIDE} steps were shorter than the digests")
    trainer.step += 1
    trainer.save()
    last = time.perf_counter() - done
    return {"save": waited + done - stepped, "save and steps": done - began, "last save": last}


def without_digests(files: Iterable[Path]) -> dict[str, str]:
    """Return texts as long as digests."""
    return {path.name: "0" * 64 for path in files}


def start_rows(words: list[str], repeats: int) -> list[dict[str, object]]:
    """Return a row for each part of a resumption, from the start of the process to a step."""
    found: list[dict[str, float]] = []
    for number in range(repeats + 1):
        command = [sys.executable, __file__, "--one-start", *words, f"train.steps={number + 1}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        found += [json.loads(done.stdout.splitlines()[-1])] * (number > 0)
    names = found[0]
    total = median([sum(one.values()) for one in found])
    return [
        row("resume", name, median([one[name] for one in found]), 0, repeats, 0) for name in names
    ] + [row("resume", "all", total, 0, repeats, 0)]


def one_start(words: list[str]) -> None:
    """Resume a run, take a step, and print the seconds of each part as JSON."""
    began = time.time()
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            answer = function(*arguments, **named)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
            return answer

        return run

    for name, function in PARTS.items():
        setattr(train, function, timed(name, getattr(train, function)))
    config = load(CONFIG, words)
    train.run(config)
    end_world()
    header = json.loads((Path(config.log.folder) / "run.json").read_text())["starts"][-1]
    spent["imports"] = began - header["began"]
    first = header["first_step_seconds"]
    spent["first step"] = first - header["before_first_step_seconds"]
    spent["the rest"] = first - sum(spent.values())
    print(json.dumps(spent))


def row(
    part: str, name: str, seconds: float, nbytes: int, runs: int, ratio: float
) -> dict[str, object]:
    """Return one row of the results."""
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "device": machine(),
        "part": part,
        "name": name,
        "runs": runs,
        "seconds": round(seconds, 3),
        "megabytes": round(nbytes / 1e6, 1) if nbytes else "",
        "ratio": round(ratio, 3) if ratio else "",
    }


def main() -> None:
    """Measure, print the rows and add them to the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model, nothing is recorded")
    parser.add_argument("--one-start", action="store_true", help=argparse.SUPPRESS)
    arguments, words = parser.parse_known_args()
    torch.set_num_threads(1)
    if arguments.one_start:
        one_start(words)
        return
    repeats = 1 if arguments.quick else 5
    with tempfile.TemporaryDirectory(dir=".") as folder:
        words = settings(arguments.quick, f"{folder}/run")
        rows = start_rows(words, repeats)
        rows += save_rows(load(CONFIG, settings(arguments.quick, folder)), repeats)
        end_world()
    for each in rows:
        print(*(f"{each[key]!s:>12}" for key in ("part", "seconds", "ratio")), each["name"])
    if not arguments.quick:
        write("save", rows)


if __name__ == "__main__":
    main()
