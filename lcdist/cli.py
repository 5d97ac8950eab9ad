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
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lcdist.attention import METHODS
from lcdist.attention.table import method_table
from lcdist.config import ConfigError, load
from lcdist.data.corpus import SUFFIXES, Source, standard_library
from lcdist.data.prepare import Settings, prepare
from lcdist.evaluate.report import write_report
from lcdist.evaluate.session import evaluate_checkpoint, generate_text
from lcdist.parallel import end_world
from lcdist.plan import make_plan, smallest_world
from lcdist.run import run
from lcdist.train.status import describe

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
    _overrides(plan)
    plan.set_defaults(action=_plan)

    methods = commands.add_parser("methods", help="the attention methods, as the README shows them")
    methods.set_defaults(action=_methods)

    tokenize = commands.add_parser("tokenize", help="text to a folder of tokens")
    tokenize.add_argument("source", help="folder, file or JSONL; 'stdlib' for Python's own sources")
    tokenize.add_argument("folder", help="where the tokens go")
    tokenize.add_argument("--vocab-size", type=int, help="pieces of a tokenizer to train")
    tokenize.add_argument("--tokenizer", help="a sentencepiece .model to use")
    tokenize.add_argument("--valid-fraction", type=float, default=0.05, help="documents held out")
    tokenize.add_argument("--suffix", action="append", help="file names to take, as .txt")
    tokenize.add_argument("--seed", type=int, default=0, help="of the split")
    tokenize.add_argument("--on-error", choices=["refuse", "skip"], default="refuse")
    tokenize.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    tokenize.add_argument("--overwrite", action="store_true")
    tokenize.set_defaults(action=_tokenize)

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

    status = commands.add_parser("status", help="how a run stands: progress, speed, restarts")
    status.add_argument("folder", type=Path, help="run folder")
    status.set_defaults(action=_status)

    report = commands.add_parser("report", help="a run folder's report.html")
    report.add_argument("folder", type=Path)
    report.set_defaults(action=_report)
    return parser


def _overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def _plan(arguments: argparse.Namespace) -> None:
    config = load(arguments.config, arguments.overrides)
    asked = arguments.world_size
    plan = make_plan(config, smallest_world(config) if asked is None else asked)
    table = Table("what", "how much", title=arguments.config)
    for row in plan.rows():
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
    settings = Settings(
        vocab_size=vocab_size,
        valid_fraction=arguments.valid_fraction,
        seed=arguments.seed,
        on_error=arguments.on_error,
        threads=arguments.threads,
    )
    columns = (TextColumn("tokenizing"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeElapsedColumn()) as bar:
        task = bar.add_task("tokenizing", total=None)
        prepared = prepare(
            source,
            arguments.folder,
            settings,
            tokenizer=arguments.tokenizer,
            overwrite=arguments.overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    meta = prepared.meta
    counts = ", ".join(f"{n:,} tokens for {split}" for split, n in meta.tokens.items())
    state = "wrote" if prepared.fresh else "already done:"
    print(f"{state} {prepared.folder}: {counts}, vocabulary of {meta.vocab_size}")
    if meta.skipped:
        print(f"skipped {len(meta.skipped)} unreadable pieces, listed in meta.json")


def _train(arguments: argparse.Namespace) -> None:
    outcome = run(load(arguments.config, arguments.overrides))
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
    table = Table(show_header=False, title=str(arguments.folder))
    for row in describe(arguments.folder):
        table.add_row(*row)
    Console().print(table)


def _report(arguments: argparse.Namespace) -> None:
    print(write_report(arguments.folder))
