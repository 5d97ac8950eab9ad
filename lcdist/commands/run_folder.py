"""`lcdist run-folder`: print the run folder of a configuration. Needs no torch.

A batch script calls it before any launcher starts, so that a mistake in the configuration or in the
size of the job is reported once instead of by every rank.
"""

import argparse
import sys
from pathlib import Path

from lcdist.commands.arguments import add_config
from lcdist.config.fields import RANKS
from lcdist.config.load import ConfigError
from lcdist.config.schema import Config
from lcdist.config.values import shown
from lcdist.rundir.source import load_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the size of the job and the configuration."""
    parser.add_argument("nodes", type=int, help="nodes of the job")
    parser.add_argument("procs", type=int, help="ranks on each node")
    add_config(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the folder, without a newline; stages lie in the folder of the whole run."""
    stages = load_run(arguments.config, arguments.overrides)
    for stage in stages:
        check_mesh(stage.config, arguments.nodes, arguments.procs)
    folder = Path(stages[0].config.log.folder)
    sys.stdout.write(str(folder.parent if stages[0].name else stages[0].config.log.folder))
    return 0


def check_mesh(config: Config, nodes: int, procs: int) -> None:
    """Raise ConfigError if the mesh does not fit `nodes` x `procs` ranks."""
    sizes = config.parallel
    mesh = sizes.tp_size * sizes.pp_size * sizes.cp_size
    if min(nodes, procs) < 1 or nodes * procs > RANKS.most:
        raise ConfigError(
            [
                f"run-folder {shown(nodes)} {shown(procs)}: nodes and ranks on a node must be at "
                f"least 1, and all ranks together at most {RANKS.most:,}"
            ]
        )
    if nodes * procs % mesh:
        raise ConfigError(
            [
                f"parallel.tp_size x pp_size x cp_size = {sizes.tp_size} x {sizes.pp_size} x "
                f"{sizes.cp_size} = {mesh} ranks, or a multiple of it, and this job has {nodes} "
                f"nodes x {procs} = {nodes * procs}; ask sbatch for other --nodes or "
                "--gpus-per-node, or change the mesh"
            ]
        )
