"""The words of `lcdist convert`, and what they do."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from lcdist.convert.exporting import SHARD_BYTES, export_model
from lcdist.convert.importing import import_model

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_commands(commands: Any) -> None:
    """Put `convert` among the commands of a parser."""
    convert = commands.add_parser("convert", help="models from Hugging Face's format, and to it")
    directions = convert.add_subparsers(required=True, metavar="DIRECTION")

    inward = directions.add_parser("import", help="a Hugging Face folder to a checkpoint")
    inward.add_argument("source", type=Path, metavar="HF_FOLDER", help="with safetensors files")
    inward.add_argument("out", type=Path, metavar="OUT", help="folder to make, like a run's")
    inward.add_argument("overrides", nargs="*", metavar="section.key=value")
    inward.set_defaults(action=_import)

    outward = directions.add_parser("export", help="a checkpoint to a Hugging Face folder")
    outward.add_argument("checkpoint", type=Path, help="checkpoint, or run folder for its latest")
    outward.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    outward.add_argument(
        "--shard-size", type=size, default=SHARD_BYTES, help="of a file at most: 5GB by default"
    )
    outward.set_defaults(action=_export)


def size(text: str) -> int:
    """Bytes of a size such as 5GB or 512MiB. Raises argparse's error where it is none."""
    word = text.strip().upper()
    unit = next((unit for unit in _UNITS if word.endswith(unit)), "")
    try:
        found = round(float(word.removesuffix(unit)) * _UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 5GB or 512MiB")
    return found


def _say(text: str) -> None:
    Console().print(text, soft_wrap=True, highlight=False, markup=False)


def _import(arguments: argparse.Namespace) -> None:
    done = import_model(arguments.source, arguments.out, arguments.overrides)
    _say(f"wrote {done.out}: {done.num_parameters:,} parameters; {done.difference}")


def _export(arguments: argparse.Namespace) -> None:
    done = export_model(arguments.checkpoint, arguments.out, arguments.shard_size)
    files = f"{len(done.shards)} file{'s' * (len(done.shards) > 1)}"
    _say(f"wrote {done.out}: weights in {files}; {done.difference}")
