"""The words of `lcdist convert`, and what they do."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from lcdist.convert.huggingface.export_model import SHARD_BYTES, export_model
from lcdist.convert.huggingface.import_model import import_model
from lcdist.convert.lora.adapter import export_adapter
from lcdist.convert.lora.merge import merge, unmerge

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_commands(commands: Any) -> None:
    """Put `convert` among the commands of a parser."""
    convert = commands.add_parser("convert", help="models from Hugging Face's format, and to it")
    directions = convert.add_subparsers(required=True, metavar="DIRECTION")

    inward = directions.add_parser("import", help="a Hugging Face folder to a checkpoint")
    inward.add_argument("source", type=Path, metavar="HF_FOLDER", help="with safetensors files")
    inward.add_argument("out", type=Path, metavar="OUT", help="folder to make, like a run's")
    inward.add_argument("overrides", nargs="*", metavar="section.key=value")
    inward.add_argument(
        "--extra-tokens",
        type=int,
        default=0,
        help="new tokens, 1 for landmark attention; their rows are the mean of the others",
    )
    inward.set_defaults(action=_import)

    outward = directions.add_parser("export", help="a checkpoint to a Hugging Face folder")
    outward.add_argument("checkpoint", type=Path, help="checkpoint, or run folder for its latest")
    outward.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    outward.add_argument(
        "--shard-size", type=size, default=SHARD_BYTES, help="of a file at most: 5GB by default"
    )
    outward.set_defaults(action=_export)
    _add_adapters(directions)


def _add_adapters(directions: Any) -> None:
    adapter = directions.add_parser("adapter", help="a run's LoRA adapters to a PEFT folder")
    adapter.set_defaults(action=_adapter)
    merging = directions.add_parser("merge", help="LoRA adapters into the weights, a checkpoint")
    merging.set_defaults(action=_merge)
    back = directions.add_parser("unmerge", help="LoRA adapters out of merged weights")
    back.add_argument("merged", type=Path, help="what 'merge' made, or a run that started there")
    back.set_defaults(action=_unmerge)
    for parser in (adapter, merging, back):
        parser.add_argument(
            "adapted", type=Path, metavar="RUN", help="run, or checkpoint of one, with adapters"
        )
        parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")


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
    words = arguments.overrides, arguments.extra_tokens
    done = import_model(arguments.source, arguments.out, *words)
    new = done.new_tokens
    grown = f"vocabulary grown by {new}, new rows the mean of the others; " if new else ""
    _say(f"wrote {done.out}: {done.num_parameters:,} parameters; {grown}{done.difference}")


def _export(arguments: argparse.Namespace) -> None:
    done = export_model(arguments.checkpoint, arguments.out, arguments.shard_size)
    files = f"{len(done.shards)} file{'s' * (len(done.shards) > 1)}"
    _say(f"wrote {done.out}: weights in {files}; {done.difference}")


def _adapter(arguments: argparse.Namespace) -> None:
    export_adapter(arguments.adapted, arguments.out)
    _say(
        f"wrote {arguments.out}, in PEFT's format: it belongs on the weights the run started from, "
        "with the run's rotation"
    )


def _merge(arguments: argparse.Namespace) -> None:
    merge(arguments.adapted, arguments.out)
    _say(f"wrote {arguments.out}: a checkpoint without adapters, for 'lcdist convert export'")


def _unmerge(arguments: argparse.Namespace) -> None:
    unmerge(arguments.merged, arguments.adapted, arguments.out)
    _say(f"wrote {arguments.out}: the weights that the adapters were trained on, to rounding")
