"""Benchmark training steps of the quickstart model: lcdist on several meshes against plain PyTorch.

    python kernels/bench/bench_training.py [--quick]

First the plain model and lcdist must compute the same loss from the same weights; otherwise nothing
is timed. Then a step of each is timed in turn, one thread a process: plain PyTorch with torch's own
attention, and lcdist alone, on cp 2 and on tp 2. All read the same synthetic text. Rows are added
to results/training.csv.
"""

import argparse
import csv
import json
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median

import torch
from plain_llama import PlainLlama
from rich.console import Console
from rich.table import Table

from lcdist.config import load
from lcdist.config.schema import Config
from lcdist.distributed.mesh import build_mesh, end_world, start_world
from lcdist.hardware.peak import Peak, peak_memory
from lcdist.model.rotary import make_rotary
from lcdist.plan import make_plan
from lcdist.train.build import build_trainer, open_dataset
from lcdist.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "training.csv"
CONFIG = ROOT / "configs/quickstart/pretrain.toml"
MESHES = {
    "alone": [],
    "cp 2": ["parallel.cp_size=2"],
    "tp 2": ["parallel.tp_size=2", "parallel.sequence_parallel=true"],
}
LENGTHS = {512: 8, 4096: 4}  # tokens: steps that count
QUICK = {256: 3}
GATE = 1e-5


def settings(seqlen: int, steps: int) -> list[str]:
    """Return the overrides of a short run on synthetic text: 4,096 tokens or one sample a step."""
    batch = max(1, 4096 // seqlen)
    return [
        "data.source=synthetic",
        "data.path=''",
        f"train.seqlen={seqlen}",
        f"train.steps={steps}",
        f"train.micro_batch_size={batch}",
        f"train.global_batch_size={batch}",
        "optim.warmup_steps=1",
        "log.tensorboard=false",
        "log.peak_tflops=1",
        "checkpoint.every=0",
    ]


def single(config: Config) -> Trainer:
    """Return the trainer of lcdist in this process."""
    plan = make_plan(config, 1)
    start_world(60)
    mesh = build_mesh(config.parallel, config.train.seed)
    return build_trainer(plan, mesh, open_dataset(plan), Peak(1e12, "config"))


def gate(seqlen: int) -> str | None:
    """Return how far the two losses and embedding gradients differ, or None if they agree."""
    trainer = single(load(CONFIG, settings(seqlen, 1)))
    plain = _plain(trainer)
    batch = trainer.loader.step_at(0)[0]
    loss = plain(batch.tokens, batch.labels)
    loss.backward()
    ours = trainer.engine.forward_backward([batch]).mean
    gradient = trainer.engine.gradient("embedding.word_embeddings.weight")
    expected = plain.embedding.weight.grad
    assert expected is not None
    error = (expected - gradient).norm() / gradient.norm()
    end_world()
    if abs(ours - loss.item()) > GATE * abs(ours) or not error < GATE:
        return f"losses {ours} and {loss.item()}, embedding gradients apart by {error:.2g}"
    return None


def _plain(trainer: Trainer) -> PlainLlama:
    plan = trainer.plan
    state = trainer.engine.state_dict(weights_only=True)["model"]["chunk0"]
    weights = {name: entry.data for name, entry in state.items()}
    rotary = make_rotary(plan.config.model.rope, plan.shape.head_dim)
    return PlainLlama(plan.config.model, weights, rotary)


def time_plain(seqlen: int, steps: int) -> tuple[float, int]:
    """Return the median seconds of a step of the plain loop, and the process's peak bytes."""
    trainer = single(load(CONFIG, settings(seqlen, steps)))
    model, loader, optim = _plain(trainer), trainer.loader, trainer.plan.config.optim
    end_world()
    betas = (optim.beta1, optim.beta2)
    adamw = torch.optim.AdamW(model.parameters(), lr=optim.lr, betas=betas, fused=True)
    del trainer
    seconds = []
    for _ in range(steps):
        begun = time.perf_counter()
        batch = loader.next_step()[0]
        adamw.zero_grad(set_to_none=True)
        loss = model(batch.tokens, batch.labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        adamw.step()
        loss.item()
        seconds.append(time.perf_counter() - begun)
    return median(seconds[1:]), peak_memory(torch.device("cpu"))


def time_lcdist(mesh: list[str], seqlen: int, steps: int) -> tuple[float, int]:
    """Return the median seconds of a step on `mesh` under torchrun, and the largest peak bytes."""
    ranks = 2 if mesh else 1
    with tempfile.TemporaryDirectory() as folder:
        words = [str(CONFIG), *settings(seqlen, steps), *mesh, f"log.folder={folder}/run"]
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        run([sys.executable, "-m", *launcher, str(ROOT / "launch/train.py"), *words])
        lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return median(r["time"]["step"] for r in records[1:]), records[-1]["memory_bytes"]


def run(words: list[str]) -> str:
    """Run a child process and return its standard output; show its errors if it fails."""
    env = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout


def main() -> int:
    """Run the gate, time, print a table and add rows; return 1 if the gate failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short length, no rows written")
    parser.add_argument("--plain", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.plain:
        sys.stdout.write(json.dumps(time_plain(*arguments.plain)))
        return 0
    red = gate(320)
    if red:
        Console(stderr=True).print(f"[red]not timed:[/] plain PyTorch and lcdist disagree: {red}")
        return 1
    rows = [row for length in (QUICK if arguments.quick else LENGTHS) for row in measure(length)]
    show(rows)
    if not arguments.quick:
        write(rows)
    return 0


def measure(seqlen: int) -> list[dict]:
    """Return a row for each contender at `seqlen`, all from this run."""
    steps = 1 + (LENGTHS | QUICK)[seqlen]
    plain = json.loads(run([sys.executable, __file__, "--plain", str(seqlen), str(steps)]))
    found = {"plain PyTorch": plain}
    found |= {f"lcdist {name}": time_lcdist(mesh, seqlen, steps) for name, mesh in MESHES.items()}
    tokens = max(4096, seqlen)
    return [
        {
            "contender": name,
            "seqlen": seqlen,
            "step_ms": round(seconds * 1e3, 1),
            "tokens_per_second": round(tokens / seconds),
            "against_plain": round(plain[0] / seconds, 3),
            "peak_mib_a_rank": round(memory / 2**20),
        }
        for name, (seconds, memory) in found.items()
    ]


def show(rows: list[dict]) -> None:
    """Print the rows as a table; speed is relative to plain PyTorch at the same length."""
    table = Table(*[key.replace("_", " ") for key in rows[0]])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


def write(rows: list[dict]) -> None:
    """Add the rows to the CSV, each with device, date, commit and torch's version."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    commit = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    about = {
        "device": f"{platform.machine()} CPU, 1 thread a rank",
        "date": date.today().isoformat(),
        "commit": commit,
        "torch": torch.__version__,
    }
    fresh = not RESULTS.exists()
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about])
        if fresh:
            writer.writeheader()
        writer.writerows({**row, **about} for row in rows)


if __name__ == "__main__":
    sys.exit(main())
