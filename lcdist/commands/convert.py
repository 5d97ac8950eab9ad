"""`lcdist convert`: import, export, and LoRA adapters."""

import argparse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lcdist.commands.arguments import add_overrides
from lcdist.commands.console import plain_console
from lcdist.convert.huggingface.export_model import SHARD_BYTES, export_model
from lcdist.convert.huggingface.import_model import import_model
from lcdist.convert.lora.adapter import export_adapter
from lcdist.convert.lora.merge import merge, unmerge
from lcdist.distributed.mesh import end_world
from lcdist.utils.progress import BYTES, Progress, progress_console, show_progress

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand for each conversion."""
    directions = parser.add_subparsers(required=True, metavar="DIRECTION")

    importing = directions.add_parser("import", help="a Hugging Face folder to a checkpoint")
    importing.add_argument("source", type=Path, metavar="HF_FOLDER", help="with safetensors files")
    importing.add_argument("out", type=Path, metavar="OUT", help="folder to create, like a run's")
    add_overrides(importing)
    importing.add_argument(
        "--extra-tokens",
        type=int,
        default=0,
        help="tokens to add, 1 for landmark attention; their rows are the mean of the others",
    )
    importing.add_argument(
        "--deepspeed",
        type=Path,
        metavar="FOLDER",
        help="DeepSpeed checkpoint with the weights (ZeRO 1, 2, 3 or universal); HF_FOLDER then "
        "needs only config.json and the tokenizer",
    )
    importing.set_defaults(action=_import)

    exporting = directions.add_parser("export", help="a checkpoint to a Hugging Face folder")
    exporting.add_argument(
        "checkpoint", type=Path, help="checkpoint, or run folder for its latest checkpoint"
    )
    exporting.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    exporting.add_argument(
        "--shard-size",
        type=parse_size,
        default=SHARD_BYTES,
        help="maximum size of a file (default: 5GB)",
    )
    exporting.set_defaults(action=_export)
    _add_lora_commands(directions)


def run(arguments: argparse.Namespace) -> int:
    """Run the conversion that was chosen."""
    try:
        arguments.action(arguments)
    finally:
        end_world()
    return 0


def _add_lora_commands(directions: Any) -> None:
    adapter = directions.add_parser("adapter", help="a run's LoRA adapters to a PEFT folder")
    adapter.set_defaults(action=_adapter)
    merging = directions.add_parser("merge", help="merge LoRA adapters into a new checkpoint")
    merging.set_defaults(action=_merge)
    unmerging = directions.add_parser("unmerge", help="remove merged LoRA adapters")
    unmerging.add_argument(
        "merged", type=Path, help="folder that 'merge' wrote, or a run that started from it"
    )
    unmerging.set_defaults(action=_unmerge)
    for parser in (adapter, merging, unmerging):
        parser.add_argument(
            "adapted", type=Path, metavar="RUN", help="run or checkpoint with adapters"
        )
        parser.add_argument("out", type=Path, metavar="OUT", help="folder to create")


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 5GB or 512MiB. Raises ArgumentTypeError if invalid."""
    upper = text.strip().upper()
    unit = next((unit for unit in _UNITS if upper.endswith(unit)), "")
    try:
        size = round(float(upper.removesuffix(unit)) * _UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 5GB or 512MiB")
    return size


def _print(text: str) -> None:
    plain_console(highlight=False).print(text, soft_wrap=True)


def _progress() -> AbstractContextManager[Progress]:
    return show_progress(BYTES, progress_console())


def _import(arguments: argparse.Namespace) -> None:
    with _progress() as progress:
        result = import_model(
            arguments.source,
            arguments.out,
            arguments.overrides,
            arguments.extra_tokens,
            arguments.deepspeed,
            progress,
        )
    new = result.num_new_tokens
    growth = f"vocabulary extended by {new}, new rows are the mean of the others; " if new else ""
    _print(f"wrote {result.out}: {result.num_parameters:,} parameters; {growth}{result.difference}")
    if result.note:
        _print(result.note)


def _export(arguments: argparse.Namespace) -> None:
    with _progress() as progress:
        result = export_model(arguments.checkpoint, arguments.out, arguments.shard_size, progress)
    files = f"{len(result.shards)} file{'s' * (len(result.shards) > 1)}"
    _print(f"wrote {result.out}: weights in {files}; {result.difference}")


def _adapter(arguments: argparse.Namespace) -> None:
    export_adapter(arguments.adapted, arguments.out)
    _print(
        f"wrote {arguments.out} in PEFT's format: it belongs on the weights that the run started "
        "from, with the run's rotation"
    )


def _merge(arguments: argparse.Namespace) -> None:
    with _progress() as progress:
        merge(arguments.adapted, arguments.out, progress)
    _print(f"wrote {arguments.out}: a checkpoint without adapters, for 'lcdist convert export'")


def _unmerge(arguments: argparse.Namespace) -> None:
    with _progress() as progress:
        unmerge(arguments.merged, arguments.adapted, arguments.out, progress)
    _print(f"wrote {arguments.out}: the weights before the adapters were merged, up to rounding")
