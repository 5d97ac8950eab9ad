"""Write one page about evaluations, and about several runs side by side.

Like the report of a run it is one HTML file that needs no other file and no network.
"""

import statistics
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from lcdist.report.evaluation_file import FACTS, Evaluation, evaluations_of, read_evaluations
from lcdist.report.evaluation_sections import sections
from lcdist.report.formatting import amount, duration, number
from lcdist.report.html import Figure, Table, render
from lcdist.report.run_facts import RunFolder, read_run_folder
from lcdist.report.svg import Curve, FigureOptions, plot_over_tokens
from lcdist.utils.atomic import write_file
from lcdist.utils.progress import Progress, silent

JSON = ".json"


def write_comparison(paths: Sequence[Path], output: Path, progress: Progress = silent) -> Path:
    """Write the page about runs and files of evaluations, side by side, and return its path.

    Args:
        paths: run folders, and JSON files that `lcdist evaluate` wrote.
        output: path of the page.
        progress: called with the bytes that are read.

    Raises:
        OSError: a file is missing.
        ValueError: a file has invalid contents; or nothing was measured and nothing trained.
    """
    names = distinct_names(paths)
    runs = {
        name: read_run_folder(path, progress)
        for name, path in zip(names, paths, strict=True)
        if path.suffix != JSON
    }
    evaluations: list[Evaluation] = []
    for name, path in zip(names, paths, strict=True):
        found = runs[name].evaluations if name in runs else read_evaluations(path)
        evaluations += [_under(name, each, len(found)) for each in found]
    title = ", ".join(names) if len(names) < 4 else f"{names[0]} and {len(names) - 1} others"
    write_file(output, _page(title, evaluations, runs))
    return output


def write_evaluation(table: Mapping[str, Any], title: str, output: Path) -> Path:
    """Write the page about the content of one file of `lcdist evaluate`, and return its path."""
    found = evaluations_of(table, title)
    write_file(output, _page(f"Evaluation of {title}", [_under(title, e, 1) for e in found], {}))
    return output


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell them apart, without `.json`."""
    parts = [
        (*path.resolve().parent.parts, path.resolve().name.removesuffix(JSON)) for path in paths
    ]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len({*names}) == len(names):
            return names
    raise ValueError(f"{paths[0]} is named twice: name it once")


def _under(name: str, evaluation: Evaluation, count: int) -> Evaluation:
    """Return an evaluation with the name of its file or run in its label."""
    label = evaluation.label
    if count > 1 or not label:
        label = f"{name}, {label}" if label else name
    return Evaluation(label, evaluation.facts, evaluation.measured)


def _page(title: str, evaluations: Sequence[Evaluation], runs: Mapping[str, RunFolder]) -> str:
    keys = [key for key in FACTS if any(key in each.facts for each in evaluations)]
    rows = [(FACTS[key], *(_cell(each.facts.get(key)) for each in evaluations)) for key in keys]
    facts = Table(("", *(each.label for each in evaluations)), rows)
    return render(
        "evaluation.html",
        title=title,
        facts=facts,
        sections=sections({each.label: each.measured for each in evaluations}),
        training=_training(runs) if runs else None,
    )


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def _training(runs: Mapping[str, RunFolder]) -> dict[str, Any]:
    """Return the loss of each run over its tokens, and a table of what each was."""
    curves, rows = [], []
    for index, (name, run) in enumerate(runs.items()):
        records = [record for stage in run.stages for record in stage.records]
        tokens = list(accumulate(record.tokens for record in records))
        curves.append(Curve(name, tokens, [record.loss for record in records], index))
        last = records[-max(1, min(10, len(records) // 10)) :]
        seconds = sum(record.time.step for record in records)
        rows.append(
            (
                name,
                ", ".join(f"{stage.seqlen:,}" for stage in run.stages),
                f"{len(records):,}",
                amount(tokens[-1]),
                number(statistics.fmean(record.loss for record in last)),
                amount(tokens[-1] / seconds) if seconds > 0 else "",
                duration(seconds),
            )
        )
    alt = "Training loss over tokens; the table has the last losses."
    options = FigureOptions("loss", alt, log=True, smooth=True)
    figure = Figure(plot_over_tokens(curves, options), "Training loss in nats per token.")
    head = ("", "length", "steps", "tokens", "loss", "tokens a second", "time in steps")
    return {"loss": figure, "table": Table(head, rows)}
