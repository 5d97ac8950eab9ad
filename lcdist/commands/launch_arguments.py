"""Check the arguments of `launch/run.py`, which are torchrun's.

torch's launcher answers a mistake in them with a traceback, or lets every rank find it.
"""

import argparse
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

PROGRAM = "python launch/run.py"
KINDS = ("auto", "cpu", "gpu", "xpu")
MOST_PORT = 65535
_HELP = f"see '{PROGRAM} --help'"


def parse_launch(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Return the arguments that torch's parser finds in `words`.

    Raises:
        ValueError: an argument is unknown or missing, a number of processes, nodes or a port is
            illegal, or there is no such program.
    """

    def refuse(message: str) -> NoReturn:
        if "required: training_script" in message:
            message = f"the program is missing: {PROGRAM} [options] PROGRAM [its arguments]"
        raise ValueError(f"{message}; {_HELP}")

    parser.error = refuse  # type: ignore[method-assign]
    arguments = parser.parse_args(list(words))
    _check_processes(str(arguments.nproc_per_node))
    _check_nodes(arguments.nnodes, arguments.node_rank)
    port = arguments.master_port
    if port is not None and not 0 <= port <= MOST_PORT:
        raise ValueError(f"--master-port {port}: must be from 0 to {MOST_PORT}")
    _check_program(arguments)
    return arguments


def _check_processes(text: str) -> None:
    if text not in KINDS and not (text.isdecimal() and int(text) > 0):
        raise ValueError(
            f"--nproc-per-node {text}: must be a number of processes, 1 or more, or one of "
            f"{', '.join(KINDS)}"
        )


def _check_nodes(text: str, node_rank: int) -> None:
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    least = int(found[1]) if found else 0
    most = int(found[2] or found[1]) if found else 0
    if not 1 <= least <= most:
        raise ValueError(f"--nnodes {text}: must be a number of nodes, 1 or more, or MIN:MAX")
    if not 0 <= node_rank < most:
        raise ValueError(
            f"--node-rank {node_rank}: must be from 0 to {most - 1}, as --nnodes is {text}"
        )


def _check_program(arguments: argparse.Namespace) -> None:
    """Raise ValueError if there is no such file or module; other programs are looked up later."""
    name = arguments.training_script
    if arguments.module:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            raise ValueError(f"-m {name}: there is no such module")
    elif not arguments.no_python and not Path(name).is_file():
        raise ValueError(f"{name}: there is no such program; {_HELP}")
