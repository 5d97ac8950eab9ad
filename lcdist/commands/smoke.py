"""Ten steps of a small model over all ranks; then bytes sent beside the plan's, and bandwidth.

torchrun -m lcdist.commands.smoke FOLDER [section.key=value ...], as slurm/smoke.sh does.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from lcdist.commands.train import run
from lcdist.config import load
from lcdist.config.schema import Config
from lcdist.distributed.mesh import end_world, local_rank, world_size
from lcdist.exchange import ring
from lcdist.hardware.device import device
from lcdist.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10
REPEATS = 5
MIB = 2**20


def main() -> int:
    """0 where what was sent is what the plan says; 1 where it is not."""
    folder, ranks = Path(sys.argv[1]), world_size()
    settings = [f"parallel.cp_size={ranks}", f"train.steps={STEPS}", f"log.folder={folder}"]
    config = load(ROOT / "configs" / "debug" / "full.toml", [*settings, *sys.argv[2:]])
    run(config)
    rows = bandwidths(ranks)
    agrees, sent = traffic_row(config, ranks)
    if dist.get_rank() == 0:
        console = Console(highlight=False, soft_wrap=True)
        for row in [sent, *rows]:
            console.print(row, markup=False)
    end_world()
    return 0 if agrees else 1


def traffic_row(config: Config, ranks: int) -> tuple[bool, str]:
    """Whether the busiest rank sent in the last step what the plan says, and both in words."""
    lines = Path(config.log.folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    measured = sum(json.loads(lines[-1])["exchange_bytes"].values())
    planned = make_plan(config, ranks).traffic.exchange_bytes_per_step
    row = f"exchange, bytes a step: measured {measured:,}, planned {planned:,}"
    return measured == planned, row


def bandwidths(ranks: int) -> list[str]:
    """What a rank sends a second, in a ring and in an all-reduce over all ranks."""
    where = device(local_rank())
    size = (256 if where.type == "cuda" else 4) * MIB
    block = torch.zeros(1, size // 4, device=where)

    def lap() -> None:
        with torch.no_grad():
            for _ in ring(block, dist.group.WORLD):
                pass

    # A ring algorithm's all-reduce sends every element twice but for its own part.
    sent = {"ring": (lap, ranks - 1), "all-reduce": (reduce_all(block), 2 * (ranks - 1) / ranks)}
    name = dist.get_backend()
    return [
        f"{verb}, {size // MIB} MiB, {ranks} ranks, {name}: "
        f"{times * size / seconds(action, where) / 1e9:.2f} GB/s a rank"
        for verb, (action, times) in sent.items()
    ]


def reduce_all(block: torch.Tensor) -> Callable[[], None]:
    """An action that sums `block` over all ranks, in place."""

    def action() -> None:
        dist.all_reduce(block)

    return action


def seconds(action: Callable[[], None], where: torch.device) -> float:
    """Of one action, the mean of several, all ranks beginning and ending together."""

    def settled() -> float:
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        dist.barrier()
        return time.perf_counter()

    action()
    begun = settled()
    for _ in range(REPEATS):
        action()
    return (settled() - begun) / REPEATS


if __name__ == "__main__":
    sys.exit(main())
