"""Print the run folder of a configuration: run_folder.py NODES PROCS CONFIG [KEY=VALUE ...]

Needs no torch: a mistake is known, once and not from every rank, before any launcher starts.
"""

import sys
from pathlib import Path

from lcdist.config.schema import Config
from lcdist.config.stages import load_stages


def folder_of(config: Config, nodes: int, procs: int) -> str:
    """The folder. Raises ValueError where the mesh does not fit `nodes` times `procs` ranks."""
    sizes = config.parallel
    mesh = sizes.tp_size * sizes.pp_size * sizes.cp_size
    if nodes * procs % mesh:
        raise ValueError(
            f"parallel.tp_size x pp_size x cp_size = {sizes.tp_size} x {sizes.pp_size} x "
            f"{sizes.cp_size} = {mesh} ranks, or a multiple of it, and this job has {nodes} nodes "
            f"x {procs} = {nodes * procs}; ask sbatch for other --nodes or --gpus-per-node, or "
            "change the mesh"
        )
    return config.log.folder


def main() -> str | None:
    """What is wrong, if anything is."""
    nodes, procs, path, *overrides = sys.argv[1:]
    try:
        stages = load_stages(path, overrides)
        folders = [folder_of(stage.config, int(nodes), int(procs)) for stage in stages]
        # Stages lie in the folder of the whole.
        sys.stdout.write(str(Path(folders[0]).parent) if stages[0].name else folders[0])
    except (ValueError, FileNotFoundError) as error:
        return "\n".join(f"configuration error: {line}" for line in str(error).splitlines())
    return None


if __name__ == "__main__":
    sys.exit(main())
