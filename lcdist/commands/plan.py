"""`lcdist plan`: show what a run would be, without running it."""

import argparse

from rich.table import Table

from lcdist.commands.arguments import add_config
from lcdist.commands.console import plain_console
from lcdist.hardware.gpu_specs import GPU_SPECS
from lcdist.plan import make_plan, plan_rows, smallest_world
from lcdist.rundir.source import load_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the configuration, the number of ranks and the GPU."""
    parser.add_argument(
        "--world-size", type=int, help="number of ranks (default: the smallest the mesh allows)"
    )
    parser.add_argument(
        "--hardware",
        choices=sorted(GPU_SPECS),
        metavar="GPU",
        help=f"plan for this GPU instead of this machine: {', '.join(sorted(GPU_SPECS))}",
    )
    add_config(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print one table of plan rows for each stage of the configuration."""
    for stage in load_run(arguments.config, arguments.overrides):
        world_size, title = arguments.world_size, arguments.config
        if world_size is None:
            world_size = smallest_world(stage.config)
        table = Table("what", "how much", title=f"{title}: {stage.name}" if stage.name else title)
        plan = make_plan(stage.config, world_size, GPU_SPECS.get(arguments.hardware))
        for row in plan_rows(plan):
            table.add_row(*row)
        plain_console().print(table)
    return 0
