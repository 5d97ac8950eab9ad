"""The door: `lcdist COMMAND ...` parses words and calls one function.

Commands that need a whole world (train, evaluate, generate) are started by torchrun as
`launch/train.py` is, or alone as a world of one.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lcdist.attention import METHODS
from lcdist.attention.table import method_table
from lcdist.commands.convert import add_commands as add_convert
from lcdist.commands.stages import run_stages
from lcdist.config import ConfigError
from lcdist.config.stages import load_stages
from lcdist.data.prepare.corpus import SUFFIXES, Source, standard_library
from lcdist.data.prepare.prepare import prepare, summary_lines
from lcdist.data.prepare.settings import TokenizeSettings
from lcdist.data.tokenizers.huggingface import SpecialTokens
from lcdist.distributed.mesh import end_world
from lcdist.evaluate.loaded_model import evaluate_checkpoint, generate_text
from lcdist.hardware.gpu_specs import GPU_SPECS
from lcdist.plan import make_plan, plan_rows, smallest_world
from lcdist.report.sections import write_report
from lcdist.rundir.status import describe, stage_folders

COMPARED = ("before", "after")


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 for a mistake of the user's."""
    arguments = parse_words(words)
    is_first = os.environ.get("RANK", "0") == "0"
    set_up_logging(is_first)
    try:
        arguments.action(arguments)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        if is_first:
            prefix = "configuration error" if isinstance(error, ConfigError) else "error"
            lines = str(error).splitlines()
            print("\n".join(f"{prefix}: {line}" for line in lines), file=sys.stderr)
        return 2
    finally:
        end_world()
    return 0


def parse_words(words: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of one command line; argparse shows its usage and exits with 2 on a mistake."""
    parser = make_parser()
    arguments, late = parser.parse_known_args(words)
    # argparse before Python 3.12 does not take overrides that follow an option.
    if late and ("overrides" not in arguments or any(word.startswith("-") for word in late)):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if late:
        arguments.overrides += late
    return arguments


def set_up_logging(is_first: bool) -> None:
    """Log lines on standard error: from rank 0 all that is of use, from the others warnings."""
    handler = RichHandler(
        console=Console(stderr=True), show_path=False, show_level=False, log_time_format="%H:%M:%S"
    )
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("lcdist").setLevel(logging.INFO if is_first else logging.ERROR)


def make_parser() -> argparse.ArgumentParser:
    """The commands and their arguments; `arguments.action(arguments)` is what they do."""
    parser = argparse.ArgumentParser(prog="lcdist", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    plan = commands.add_parser("plan", help="what a run would be, without running it")
    plan.add_argument("config", help="TOML file")
    plan.add_argument("--world-size", type=int, help="ranks; the mesh's smallest by default")
    plan.add_argument(
        "--hardware",
        choices=sorted(GPU_SPECS),
        metavar="GPU",
        help=f"plan for this GPU instead of this machine: {', '.join(sorted(GPU_SPECS))}",
    )
    _overrides(plan)
    plan.set_defaults(action=_plan)

    methods = commands.add_parser("methods", help="the attention methods, as the README shows them")
    methods.set_defaults(action=_methods)

    _tokenize_words(commands.add_parser("tokenize", help="text to a folder of tokens"))

    train = commands.add_parser("train", help="train as a configuration says")
    train.add_argument("config", help="TOML file")
    _overrides(train)
    train.set_defaults(action=_train)

    evaluate = commands.add_parser("evaluate", help="perplexity by length of a checkpoint")
    evaluate.add_argument("checkpoint", help="checkpoint, or run folder for its latest")
    evaluate.add_argument("--before", type=Path, help="another checkpoint to compare with")
    evaluate.add_argument("--output", type=Path, help="JSON file to write")
    _overrides(evaluate)
    evaluate.set_defaults(action=_evaluate)

    generate = commands.add_parser("generate", help="continue a text")
    generate.add_argument("checkpoint", help="checkpoint, or run folder for its latest")
    generate.add_argument("--prompt", default="", help="text; read from standard input if empty")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--output", type=Path, help="text file to write")
    _overrides(generate)
    generate.set_defaults(action=_generate)

    add_convert(commands)

    status = commands.add_parser("status", help="how a run stands: progress, speed, restarts")
    status.add_argument("folder", type=Path, help="run folder")
    status.set_defaults(action=_status)

    report = commands.add_parser("report", help="a run folder's report.html")
    report.add_argument("folder", type=Path)
    report.set_defaults(action=_report)
    return parser


def _tokenize_words(tokenize: argparse.ArgumentParser) -> None:
    tokenize.add_argument(
        "source",
        help="folder or file: text, .jsonl, .jsonl.gz, .jsonl.zst, .parquet; 'stdlib' for Python's",
    )
    tokenize.add_argument("folder", help="where the tokens go")
    tokenize.add_argument("--vocab-size", type=int, help="pieces of a tokenizer to train")
    tokenize.add_argument(
        "--tokenizer", help="a sentencepiece .model, a tokenizer.json, a model's folder, or 'bytes'"
    )
    tokenize.add_argument("--bos-token", help="for a tokenizer.json that does not say")
    tokenize.add_argument("--eos-token", help="the same, of the token that ends a document")
    tokenize.add_argument(
        "--add-bos", action=argparse.BooleanOptionalAction, help="begin documents with bos"
    )
    tokenize.add_argument("--valid-fraction", type=float, default=0.05, help="documents held out")
    tokenize.add_argument("--suffix", action="append", help="file names to take, as .txt")
    tokenize.add_argument("--field", default="text", help="of a JSON record or parquet column")
    tokenize.add_argument("--document-bytes", type=int, help="cut plain text there; 1 MiB")
    tokenize.add_argument("--seed", type=int, default=0, help="of the split")
    tokenize.add_argument("--on-error", choices=["refuse", "skip"], default="refuse")
    tokenize.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    tokenize.add_argument("--overwrite", action="store_true")
    tokenize.set_defaults(action=_tokenize)


def _overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def _plan(arguments: argparse.Namespace) -> None:
    for stage in load_stages(arguments.config, arguments.overrides):
        asked, title = arguments.world_size, arguments.config
        world_size = smallest_world(stage.config) if asked is None else asked
        plan = make_plan(stage.config, world_size, GPU_SPECS.get(arguments.hardware))
        table = Table("what", "how much", title=f"{title}: {stage.name}" if stage.name else title)
        for row in plan_rows(plan):
            table.add_row(*row)
        Console().print(table)


def _methods(arguments: argparse.Namespace) -> None:
    print(method_table(METHODS.values()))


def _tokenize(arguments: argparse.Namespace) -> None:
    if arguments.source == "stdlib":
        source = standard_library()
    else:
        suffixes = tuple(arguments.suffix) if arguments.suffix else SUFFIXES
        source = Source(Path(arguments.source), suffixes)
    vocab_size = arguments.vocab_size
    if vocab_size is None and arguments.tokenizer is None:
        vocab_size = 4096
    settings = TokenizeSettings(
        vocab_size=vocab_size,
        valid_fraction=arguments.valid_fraction,
        seed=arguments.seed,
        on_error=arguments.on_error,
        field=arguments.field,
        document_bytes=arguments.document_bytes,
        special_tokens=SpecialTokens(arguments.bos_token, arguments.eos_token, arguments.add_bos),
        workers=arguments.workers,
    )
    share = TextColumn("{task.percentage:>3.0f}%")
    columns = (TextColumn("{task.description}"), BarColumn(), share, DownloadColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("reading", total=None)
        prepared = prepare(
            source,
            arguments.folder,
            settings,
            tokenizer=arguments.tokenizer,
            overwrite=arguments.overwrite,
            progress=lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            ),
        )
    for line in summary_lines(prepared):
        print(line)


def _train(arguments: argparse.Namespace) -> None:
    outcome = run_stages(load_stages(arguments.config, arguments.overrides))
    logging.getLogger(__name__).info("%s: %s", outcome.status, outcome.reason)


def _evaluate(arguments: argparse.Namespace) -> None:
    paths = [Path(arguments.checkpoint)]
    if arguments.before:
        paths.insert(0, arguments.before)
    results = [evaluate_checkpoint(path, arguments.overrides) for path in paths]
    if os.environ.get("RANK", "0") != "0":
        return
    if arguments.output:
        content = results[0] if len(results) == 1 else dict(zip(COMPARED, results, strict=True))
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for path, result in zip(paths, results, strict=True):
        title = f"{path} (attention: {result['attention']})"
        table = Table("length", "perplexity", "tokens", title=title)
        for row in zip(result["lengths"], result["perplexity"], result["scored"], strict=True):
            table.add_row(str(row[0]), f"{row[1]:.3f}", f"{row[2]:,}")
        Console().print(table)


def _generate(arguments: argparse.Namespace) -> None:
    prompt = arguments.prompt or sys.stdin.read()
    text = generate_text(
        Path(arguments.checkpoint),
        prompt,
        arguments.overrides,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    if os.environ.get("RANK", "0") != "0":
        return
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


def _status(arguments: argparse.Namespace) -> None:
    for folder in stage_folders(arguments.folder) or [arguments.folder]:
        table = Table(show_header=False, title=str(folder))
        for row in describe(folder):
            table.add_row(*row)
        Console().print(table)


def _report(arguments: argparse.Namespace) -> None:
    print(write_report(arguments.folder))
