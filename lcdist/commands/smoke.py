"""`lcdist smoke`: ten training steps over all ranks, then bytes sent and bandwidth.

    python launch/run.py -m lcdist smoke FOLDER [section.key=value ...]

`slurm/smoke.sh` starts it on a cluster. All ranks are context parallel.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from lcdist.commands import train
from lcdist.commands.arguments import add_overrides
from lcdist.commands.console import plain_console
from lcdist.config import load
from lcdist.config.schema import Config
from lcdist.distributed.mesh import end_world, local_rank, world_size
from lcdist.exchange import ring
from lcdist.hardware.device import device, wait_for_device
from lcdist.plan import make_plan
from lcdist.rundir.paths import METRICS_FILE

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10
REPEATS = 5
MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run folder and overrides of configs/debug/full.toml."""
    parser.add_argument("folder", type=Path, help="run folder to create")
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> int:
    """Return 0 if the bytes sent equal the plan's, else 1; rank 0 prints both and the bandwidth."""
    try:
        return _run(arguments)
    finally:
        end_world()


def _run(arguments: argparse.Namespace) -> int:
    ranks = world_size()
    settings = [f"parallel.cp_size={ranks}", f"train.steps={STEPS}"]
    settings += [f"log.folder={arguments.folder}", *arguments.overrides]
    config = load(ROOT / "configs" / "debug" / "full.toml", settings)
    train.run(config)
    bandwidth_rows = bandwidths(ranks)
    agrees, traffic = traffic_row(config, ranks)
    if dist.get_rank() == 0:
        console = plain_console(highlight=False, soft_wrap=True)
        for row in [traffic, *bandwidth_rows]:
            console.print(row)
    return 0 if agrees else 1


def traffic_row(config: Config, ranks: int) -> tuple[bool, str]:
    """Compare the bytes that the busiest rank sent in the last step with the plan's.

    Returns:
        Whether both are equal, and a line with both.
    """
    lines = Path(config.log.folder, METRICS_FILE).read_text(encoding="utf-8").splitlines()
    measured = sum(json.loads(lines[-1])["exchange_bytes"].values())
    planned = make_plan(config, ranks).traffic.exchange_bytes_per_step
    row = f"exchange, bytes a step: measured {measured:,}, planned {planned:,}"
    return measured == planned, row


def bandwidths(ranks: int) -> list[str]:
    """Measure GB/s sent per rank, in a ring and in an all-reduce over all ranks."""
    where = device(local_rank())
    size = (256 if where.type == "cuda" else 4) * MIB
    block = torch.zeros(1, size // 4, device=where)

    def run_ring() -> None:
        with torch.no_grad():
            for _ in ring(block, dist.group.WORLD):
                pass

    def run_all_reduce() -> None:
        dist.all_reduce(block)

    # A ring algorithm's all-reduce sends every element twice, except the rank's own part.
    actions = {
        "ring": (run_ring, ranks - 1),
        "all-reduce": (run_all_reduce, 2 * (ranks - 1) / ranks),
    }
    name = dist.get_backend()
    return [
        f"{verb}, {size // MIB} MiB, {ranks} ranks, {name}: "
        f"{blocks_sent * size / seconds(action, where) / 1e9:.2f} GB/s a rank"
        for verb, (action, blocks_sent) in actions.items()
    ]


def seconds(action: Callable[[], None], where: torch.device) -> float:
    """Return the mean duration of `action`; all ranks start and end together."""

    def time_after_barrier() -> float:
        wait_for_device(where)
        dist.barrier()
        return time.perf_counter()

    action()
    start = time_after_barrier()
    for _ in range(REPEATS):
        action()
    return (time_after_barrier() - start) / REPEATS
