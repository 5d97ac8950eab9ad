"""Write the report of a run: one HTML file that needs no other file and no network.

Facts that do not depend on the clock come from `report_facts` and are shown first. Times, rates and
memory differ for a run that was resumed or moved, and are shown separately under "What it cost".
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from lcdist.report.evaluation_sections import sections
from lcdist.report.formatting import amount, duration, flatten, number, percent, size
from lcdist.report.html import Figure, Shares, Table, render_report
from lcdist.report.profile_section import profile_sections
from lcdist.report.run_facts import RunFolder, Stage, facts_of, read_run_folder, report_facts
from lcdist.report.section import Section
from lcdist.report.svg import Curve, FigureOptions, plot_over_tokens, plot_perplexity
from lcdist.rundir.records import StepRecord, without_profiled
from lcdist.utils.atomic import write_file
from lcdist.utils.progress import Progress, silent

__all__ = ["report_facts", "write_report"]

TIME_PARTS = ("data", "forward_backward", "optimizer", "other")


def write_report(folder: Path, output: Path | None = None, progress: Progress = silent) -> Path:
    """Write the report of a run, or of a run of several stages, and return its path.

    Args:
        folder: folder of the run.
        output: path of the report; None for `folder`/report.html.
        progress: called with the bytes that are read.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file has invalid contents; the message names file and line.
    """
    run = read_run_folder(folder, progress)
    facts = facts_of(run)
    page = render_report(
        summary=_summary(run, facts),
        perplexity=_perplexity(facts) if facts["evaluation"] else None,
        evaluations=_evaluations(run),
        learning=_learning(run, facts),
        conversion=_conversion(run.conversion) if run.conversion else None,
        cost=_cost(run, facts),
        setup=_setup(run, facts),
    )
    output = output or folder / "report.html"
    write_file(output, page)
    return output


def _evaluations(run: RunFolder) -> list[Section]:
    """Return what `lcdist evaluate` measured; of `lcdist extend` there is a section already."""
    if run.evaluation is not None:
        return []
    return sections({each.label or run.name: each.measured for each in run.evaluations})


def _summary(run: RunFolder, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the title, the lead paragraph and the headline numbers."""
    last_stage = run.stages[-1]
    seconds = sum(record.time.step for stage in run.stages for record in stage.records)
    rate = amount(_mean_rate(run))
    headline = _headline(facts) if facts["headline"] else None
    if headline:
        change = f"{headline['before']} \N{RIGHTWARDS ARROW} {headline['after']}"
        first_tile = (f"perplexity at {headline['length']}", change)
    else:
        first_tile = ("loss, last step (nats per token)", number(last_stage.records[-1].loss))
    return {
        "name": run.name,
        "day": str(last_stage.header["starts"][-1]["time"])[:10],
        "ranks": last_stage.header["world_size"],
        "device": last_stage.header["device"],
        "model": run.conversion["source"] if run.conversion else None,
        "stages": list(map(_stage_sentence, run.stages, facts["stages"])),
        "headline": headline,
        "duration": duration(seconds),
        "rate": rate,
        "tiles": [
            first_tile,
            ("tokens trained on", amount(facts["tokens"])),
            ("time in steps", duration(seconds)),
            ("tokens per second", rate),
        ],
    }


def _headline(facts: dict[str, Any]) -> dict[str, str]:
    """Return perplexity before and after training at one length, as text."""
    headline, evaluation = facts["headline"], facts["evaluation"]
    return {
        "length": f"{headline['length']:,}",
        "before": number(headline["before"]),
        "after": number(headline["after"]),
        "before_label": evaluation["before_label"],
        "after_label": evaluation["after_label"],
    }


def _stage_sentence(stage: Stage, fact: dict[str, Any]) -> str:
    verb = {"pretrain": "pretrained at", "extend": "extended to"}.get(stage.name, "trained at")
    return (
        f"{verb} {stage.seqlen:,} tokens for {fact['steps']:,} steps "
        f"({amount(fact['tokens'])} tokens)"
    )


def _learning(run: RunFolder, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the curves of loss, learning rate and gradient norm, and the sample."""
    change = "; ".join(
        f"{fact['name']} from {number(fact['first_loss'])} to {number(fact['last_loss'])}"
        for fact in facts["stages"]
    )
    resumes = _resumes(run)
    caption = f"Training loss in nats per token, logarithmic: {change}."
    if resumes:
        places = ", ".join(text for _, text in resumes)
        caption += f" Dotted lines: the run was resumed ({places})."
    options = FigureOptions("loss", f"Loss over tokens: {change}.", log=True, smooth=True)
    curves, marks = _curves(run, lambda record: record.loss), [tokens for tokens, _ in resumes]
    return {
        "loss": Figure(plot_over_tokens(curves, options, marks), caption),
        "small": [
            _small_figure(run, "lr", "Learning rate", lambda r: r.lr),
            _small_figure(run, "grad", "Gradient norm, before clipping", lambda r: r.grad_norm),
        ],
        "sample": facts["sample"],
    }


def _perplexity(facts: dict[str, Any]) -> dict[str, Any]:
    """Return figure and table of perplexity by length."""
    evaluation, headline = facts["evaluation"], facts["headline"]
    lengths = evaluation["lengths"]
    labels = (str(evaluation["before_label"]), str(evaluation["after_label"]))
    columns = (evaluation["before"], evaluation["after"])
    curves = [
        Curve(label, lengths, [math.nan if v is None else v for v in column], series)
        for series, (label, column) in enumerate(zip(labels, columns, strict=True))
    ]
    alt = (
        f"Perplexity by length. At {headline['length']:,} tokens: {number(headline['before'])} "
        f"{labels[0]}, {number(headline['after'])} {labels[1]}."
    )
    caption = (
        f"Perplexity by length on {evaluation['tokens']:,} scored tokens a length, with "
        f"attention = {evaluation['attention']}; both axes are logarithmic."
    )
    rows = [
        (f"{length:,}", number(before), number(after))
        for length, before, after in zip(lengths, *columns, strict=True)
    ]
    svg = plot_perplexity(lengths, curves, FigureOptions("perplexity", alt))
    return {"figure": Figure(svg, caption), "table": Table(("length", *labels), rows)}


def _conversion(conversion: Mapping[str, Any]) -> Table:
    """Return the source of the model, its changes, and the comparison of each conversion."""
    before, after = conversion["rotation"]
    items = {
        "model": f"{conversion['source']}, made for {conversion['seqlen']:,} tokens",
        "rotation": f"{before} \N{RIGHTWARDS ARROW} {after}",
        "trained": conversion["trained"],
        "import": conversion.get("model"),
        "import, with a row for landmarks": conversion.get("grown"),
        "export": conversion.get("exported"),
    }
    return Table(("", "what"), [(name, str(value)) for name, value in items.items() if value])


def _cost(run: RunFolder, facts: dict[str, Any]) -> dict[str, Any]:
    """Return speed, memory, the division of the step time, and the bytes sent."""
    rows, step_time = [], {}
    for stage in run.stages:
        records = without_profiled(stage.records)
        seconds = [sum(getattr(record.time, part) for record in records) for part in TIME_PARTS]
        total = sum(seconds)
        step_time[stage.name] = [100 * part / total if total > 0 else 0.0 for part in seconds]
        rows.append(
            (
                stage.name,
                duration(sum(record.time.step for record in stage.records)),
                amount(_median(records, lambda r: r.tokens_per_second)),
                percent(_median(records, lambda r: r.mfu_full)),
                percent(_median(records, lambda r: r.mfu_causal)),
                size(max(record.memory_bytes for record in stage.records)),
            )
        )
    head = ("stage", "time", "tokens/s", "MFU, full", "MFU, causal", "peak memory")
    memory_title = "Peak memory in MiB, largest rank"
    return {
        "table": Table(head, rows),
        "peak": _peak_note(run),
        "small": [
            _small_figure(
                run, "speed", "Tokens per second, all ranks", lambda r: r.tokens_per_second
            ),
            _small_figure(run, "memory", memory_title, lambda r: r.memory_bytes / 2**20),
        ],
        "step_time": Shares([part.replace("_", " + ") for part in TIME_PARTS], step_time),
        "exchange": _exchange(facts),
        "profiles": profile_sections(run),
    }


def _exchange(facts: dict[str, Any]) -> Table | None:
    """Return the bytes sent per step by exchange verb; None if nothing was sent."""
    verbs = sorted({verb for fact in facts["stages"] for verb in fact["exchange_bytes"]})
    rows = [
        (fact["name"], *(size(fact["exchange_bytes"].get(verb, 0)) for verb in verbs))
        for fact in facts["stages"]
    ]
    return Table(("stage", *verbs), rows) if verbs else None


def _setup(run: RunFolder, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the plan, the resolved configuration, the starts and the package versions."""
    plans = [dict(flatten(fact["plan"])) for fact in facts["stages"]]
    names = list(dict.fromkeys(name for plan in plans for name in plan))
    plan_rows = [(name, *(plan.get(name, "–") for plan in plans)) for name in names]
    starts = [
        (stage.name, f"{start['step']:,}", str(start["time"]), str(start.get("reason", "")))
        for stage in run.stages
        for start in stage.header["starts"]
    ]
    versions = run.stages[-1].header["versions"].items()
    return {
        "plan": Table(("", *(stage.name for stage in run.stages)), plan_rows),
        "configs": [(stage.name, stage.config) for stage in run.stages],
        "starts": Table(("stage", "after step", "time", "reason"), starts),
        "versions": Table(("package", "version"), list(versions)),
    }


def _small_figure(
    run: RunFolder, name: str, title: str, value: Callable[[StepRecord], float]
) -> Figure:
    """Plot a value over tokens in a small figure; its alternative text gives the range."""
    curves = _curves(run, value)
    finite = [y for curve in curves for y in curve.y if math.isfinite(y)] or [math.nan]
    alt = f"{title}: between {number(min(finite))} and {number(max(finite))}."
    options = FigureOptions(name, alt, smooth=name == "grad", small=True)
    return Figure(plot_over_tokens(curves, options), title)


def _curves(run: RunFolder, value: Callable[[StepRecord], float]) -> list[Curve]:
    """Return one curve per stage, over the tokens of all stages so far."""
    curves, tokens_before = [], 0
    for index, stage in enumerate(run.stages):
        x = [tokens_before + tokens for tokens in accumulate(r.tokens for r in stage.records)]
        label = f"{stage.name}, {stage.seqlen:,} tokens"
        curves.append(Curve(label, x, [value(r) for r in stage.records], index % 2))
        tokens_before = x[-1]
    return curves


def _resumes(run: RunFolder) -> list[tuple[float, str]]:
    """Return (tokens trained on so far, description) for every time a stage was resumed."""
    resumes, tokens_before = [], 0
    for stage in run.stages:
        for start in stage.header["starts"][1:]:
            tokens = sum(r.tokens for r in stage.records if r.step <= start["step"])
            text = f"{stage.name} after step {start['step']:,}"
            resumes.append((tokens_before + tokens, text))
        tokens_before += stage.tokens
    return resumes


def _peak_note(run: RunFolder) -> str:
    """Explain the peak performance to which MFU (model FLOPs utilisation) refers."""
    peak = run.stages[-1].header.get("peak")
    if not peak:
        return ""
    return (
        f"MFU is the fraction of the peak of all ranks, {amount(peak['flops'])}FLOP/s each "
        f"({peak['source']}); attention counted over the full square, or its causal half."
    )


def _mean_rate(run: RunFolder) -> float:
    """Return tokens per second over all steps, without those that were profiled."""
    records = [record for stage in run.stages for record in without_profiled(stage.records)]
    seconds = sum(record.time.step for record in records)
    return sum(record.tokens for record in records) / seconds if seconds > 0 else math.nan


def _median(records: Sequence[StepRecord], value: Callable[[StepRecord], float | None]) -> float:
    finite = [v for v in map(value, records) if v is not None and math.isfinite(v)]
    return statistics.median(finite) if finite else math.nan
