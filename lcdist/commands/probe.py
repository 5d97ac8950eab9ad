"""`lcdist probe`: time training steps at short lengths, with random weights and made-up text.

    python launch/run.py -m lcdist probe OUT.json CONFIG.toml CONFIG.toml ...

`lcdist extend` starts it, to say how long a training will take on this machine. The configurations
are of one model at growing lengths. Nothing but OUT.json is written.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from lcdist.config import load
from lcdist.config.schema import Config
from lcdist.distributed.mesh import build_mesh, end_world, start_world, world_size
from lcdist.hardware.device import wait_for_device
from lcdist.hardware.peak import Peak
from lcdist.plan import make_plan
from lcdist.train.build import build_trainer, open_dataset

# Seconds that all steps may be expected to take when the second length begins, and a further one.
SECOND_WITHIN, FURTHER_WITHIN = 90.0, 20.0
# Steps of a length: the first also allocates memory, and on a GPU compiles. Of the others the
# fastest counts: other programs may have held up the rest.
STEPS = 3
# A step of so many seconds is not repeated: both are little of it.
LONG_STEP = 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file to write and the configurations."""
    parser.add_argument("output", type=Path, help="JSON file to write: tokens and seconds of steps")
    parser.add_argument("configs", nargs="+", help="one model at growing lengths")


def run(arguments: argparse.Namespace) -> int:
    """Time the configurations in order; rank 0 writes what was timed."""
    configs = [load(path) for path in arguments.configs]
    try:
        start_world(configs[0].parallel.timeout)
        rows = time_steps(configs, _seconds_of_a_step)
    finally:
        end_world()
    if arguments.is_first_rank:
        arguments.output.write_text(json.dumps(rows) + "\n", encoding="utf-8")
    return 0


def time_steps(
    configs: Sequence[Config], seconds_of: Callable[[Config], tuple[float, float]]
) -> list[tuple[int, float, float]]:
    """Return (tokens of a sample, seconds of both passes, of the update), the same on all ranks.

    The last configurations are left out where they would take long.

    Args:
        configs: one model at growing lengths.
        seconds_of: times both parts of a step; all ranks get the same answer.
    """
    rows: list[tuple[int, float, float]] = []
    for config in configs:
        if rows:
            tokens, passes, update = rows[-1]
            # At short lengths products, which grow with the tokens, are most of a step.
            expected = STEPS * (1.5 * config.train.seqlen / tokens * passes + update)
            spent = STEPS * sum(passes + update for _, passes, update in rows)
            if spent + expected > (SECOND_WITHIN if len(rows) == 1 else FURTHER_WITHIN):
                break
        rows.append((config.train.seqlen, *seconds_of(config)))
    return rows


def _seconds_of_a_step(config: Config) -> tuple[float, float]:
    """Return the seconds of both passes and of the update, the same on all ranks."""
    plan = make_plan(config, world_size())
    mesh = build_mesh(config.parallel, config.train.seed)
    trainer = build_trainer(plan, mesh, open_dataset(plan), Peak(1e12, "config"))
    times: list[tuple[float, float]] = []
    while len(times) < STEPS and (not times or sum(times[-1]) < LONG_STEP):
        batches = trainer.loader.next_step(mesh.device)
        wait_for_device(mesh.device)
        dist.barrier()
        start = time.perf_counter()
        trainer.engine.forward_backward(batches)
        wait_for_device(mesh.device)
        passed = time.perf_counter()
        trainer.engine.step(0.0)
        wait_for_device(mesh.device)
        update = time.perf_counter() - passed
        times.append((_common_time(passed - start), _common_time(update)))
    del trainer
    # Models have cycles, and two of them may not fit the memory.
    gc.collect()
    passes, updates = zip(*(times[1:] or times), strict=True)
    return min(passes), min(updates)


def _common_time(seconds: float) -> float:
    """Return the largest of all ranks' numbers."""
    number = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return float(number)
