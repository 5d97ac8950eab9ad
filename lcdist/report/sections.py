"""The report of a run: one HTML file that explains itself and asks nothing of the network.

What no clock changes comes from `report_facts` and stands first; times, rates and memory, which a
resumed or moved run has of its own, stand apart under "What it cost".
"""

import math
import statistics
from collections.abc import Callable, Sequence
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

from lcdist.report import html as page
from lcdist.report.html import amount, duration, number, size
from lcdist.report.run_facts import RunFolder, Stage, facts_of, read_run_folder, report_facts
from lcdist.report.svg import Curve, Looks, over_tokens, perplexity
from lcdist.rundir.records import StepRecord
from lcdist.utils.atomic import write_file

__all__ = ["report_facts", "write_report"]

TIME_PARTS = ("data", "forward_backward", "optimizer", "other")


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of the run, or of the run's stages, in `folder`; returns where it is.

    output: None for `folder`/report.html. Raises FileNotFoundError where a file is missing,
    ValueError naming file and line where one is not what it should be.
    """
    run = read_run_folder(folder)
    facts = facts_of(run)
    body = [
        *_opening(run, facts),
        *_learned(run, facts),
        *(page.conversion(run.conversion) if run.conversion else []),
        *_cost(run, facts),
        *_made_of(run, facts),
    ]
    output = output or folder / "report.html"
    write_file(output, page.page(f"{run.name}: report of a run", body))
    return output


def _opening(run: RunFolder, facts: dict[str, Any]) -> list[str]:
    """Title, the paragraph that says it all, and the headline numbers."""
    last, headline = run.stages[-1], facts["headline"]
    seconds = _seconds(run)
    rate = facts["tokens"] / seconds if seconds > 0 else math.nan
    sentences = [_what_was_done(run, facts)]
    numbers = [("tokens trained on", amount(facts["tokens"]))]
    if headline:
        length, before, after = (headline[key] for key in ("length", "before", "after"))
        evaluation = facts["evaluation"]
        sentences.append(
            f"Perplexity at {length:,} tokens went from <b>{number(before)}</b> "
            f"({escape(evaluation['before_label'])}) to <b>{number(after)}</b> "
            f"({escape(evaluation['after_label'])})."
        )
        numbers.insert(
            0,
            (f"perplexity at {length:,}", f"{number(before)} \N{RIGHTWARDS ARROW} {number(after)}"),
        )
    else:
        loss = run.stages[-1].records[-1].loss
        numbers.insert(0, ("loss, last step (nats per token)", number(loss)))
    numbers += [("time in steps", duration(seconds)), ("tokens per second", amount(rate))]
    ranks = last.header["world_size"]
    return [
        f"<h1>{escape(run.name)}</h1>",
        f'<p class="byline">{escape(_day(last))} · {ranks} rank{"s" if ranks > 1 else ""} · '
        f"{escape(str(last.header['device']))}</p>",
        f'<p class="lead">{" ".join(sentences)} All training steps together took '
        f"{duration(seconds)}, {amount(rate)} tokens a second.</p>",
        page.tiles(numbers),
    ]


def _what_was_done(run: RunFolder, facts: dict[str, Any]) -> str:
    told = []
    verbs = {"pretrain": "pretrained", "extend": "extended"}
    for stage, fact in zip(run.stages, facts["stages"], strict=True):
        verb = verbs.get(stage.name, "trained")
        preposition = "to" if verb == "extended" else "at"
        told.append(
            f"{verb} {preposition} {stage.seqlen:,} tokens for {fact['steps']:,} steps "
            f"({amount(fact['tokens'])} tokens)"
        )
    source = run.conversion and escape(run.conversion["source"])
    model = f"The model <b>{source}</b>" if source else "A model"
    return f"{model} was {', then '.join(told)}."


def _learned(run: RunFolder, facts: dict[str, Any]) -> list[str]:
    """Perplexity, loss, gradient norm and learning rate: the same on every clock."""
    parts = ['<section id="facts">', "<h2>What was learned</h2>"]
    evaluation = facts["evaluation"]
    if evaluation:
        parts += _perplexity(evaluation, facts["headline"])
    else:
        parts.append('<p class="note">Perplexity by length has not been evaluated.</p>')
    ends = "; ".join(
        f"{fact['name']} from {number(fact['first_loss'])} to {number(fact['last_loss'])}"
        for fact in facts["stages"]
    )
    marks = _resumes(run)
    caption = f"Training loss in nats per token, logarithmic: {ends}."
    if marks:
        places = ", ".join(text for _, text in marks)
        caption += f" Dotted lines: the run was resumed ({places})."
    looks = Looks("loss", f"Loss over tokens: {ends}.", log=True, smooth=True)
    places = [place for place, _ in marks]
    parts.append(page.figure(over_tokens(_curves(run, lambda r: r.loss), looks, places), caption))
    small = [
        _small(run, "lr", "Learning rate", lambda r: r.lr),
        _small(run, "grad", "Gradient norm, before clipping", lambda r: r.grad_norm),
    ]
    return [*parts, f'<div class="pair">{"".join(small)}</div>', *_sample(facts), "</section>"]


def _perplexity(evaluation: dict[str, Any], headline: dict[str, Any]) -> list[str]:
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
    return [
        page.figure(perplexity(lengths, curves, Looks("perplexity", alt)), caption),
        page.table(("length", *labels), rows),
    ]


def _sample(facts: dict[str, Any]) -> list[str]:
    if facts["sample"] is None:
        return []
    return [
        "<h3>A sample</h3>",
        '<p class="note">The prompt, and what the model wrote after it.</p>',
        f'<pre class="prose">{escape(facts["sample"])}</pre>',
    ]


def _cost(run: RunFolder, facts: dict[str, Any]) -> list[str]:
    """Speed, memory, the split of a step, and the bytes sent."""
    rows, split = [], {}
    for stage in run.stages:
        records = stage.records
        split[stage.name] = [
            sum(getattr(record.time, part) for record in records) for part in TIME_PARTS
        ]
        rows.append(
            (
                stage.name,
                duration(sum(record.time.step for record in records)),
                amount(_median(records, lambda r: r.tokens_per_second)),
                _percent(_median(records, lambda r: r.mfu_full)),
                _percent(_median(records, lambda r: r.mfu_causal)),
                size(max(record.memory_bytes for record in records)),
            )
        )
    head = ("stage", "time", "tokens/s", "MFU, full", "MFU, causal", "peak memory")
    small = [
        _small(run, "speed", "Tokens per second, all ranks", lambda r: r.tokens_per_second),
        _small(run, "memory", "Peak memory in MiB, largest rank", lambda r: r.memory_bytes / 2**20),
    ]
    return [
        '<section id="timing">',
        "<h2>What it cost</h2>",
        page.table(head, rows),
        f'<p class="note">Medians over the steps. {escape(_peaks(run))}</p>',
        f'<div class="pair">{"".join(small)}</div>',
        "<h3>Where the time of a step goes</h3>",
        page.split_bars([part.replace("_", " + ") for part in TIME_PARTS], split),
        "</section>",
        *_exchange(facts),
    ]


def _exchange(facts: dict[str, Any]) -> list[str]:
    verbs = sorted({verb for fact in facts["stages"] for verb in fact["exchange_bytes"]})
    if not verbs:
        return []
    rows = [
        (fact["name"], *(size(fact["exchange_bytes"].get(verb, 0)) for verb in verbs))
        for fact in facts["stages"]
    ]
    return [
        "<h3>Bytes sent a step by context parallelism</h3>",
        page.table(("stage", *verbs), rows),
        '<p class="note">By verb, of the rank that sent most, forward and backward.</p>',
    ]


def _made_of(run: RunFolder, facts: dict[str, Any]) -> list[str]:
    """The plan, the resolved configuration, the starts and the versions."""
    plans = [dict(page.flat(fact["plan"])) for fact in facts["stages"]]
    names = list(dict.fromkeys(name for plan in plans for name in plan))
    rows = [(name, *(plan.get(name, "–") for plan in plans)) for name in names]
    stages = [stage.name for stage in run.stages]
    starts = [
        (stage.name, f"{start['step']:,}", str(start["time"]), str(start["reason"]))
        for stage in run.stages
        for start in stage.header["starts"]
    ]
    return [
        "<h2>What it was made of</h2>",
        "<h3>Plan</h3>",
        page.table(("", *stages), rows),
        "<h3>Configuration</h3>",
        *(page.folded(f"{stage.name}, as resolved", stage.config) for stage in run.stages),
        "<h3>Starts</h3>",
        page.table(("stage", "after step", "time", "reason"), starts),
        "<h3>Versions</h3>",
        page.table(("package", "version"), run.stages[-1].header["versions"].items()),
    ]


def _small(run: RunFolder, name: str, title: str, value: Callable[[StepRecord], float]) -> str:
    """A small figure over tokens, with its range as alternative text."""
    curves = _curves(run, value)
    seen = [y for curve in curves for y in curve.y if math.isfinite(y)] or [math.nan]
    alt = f"{title}: between {number(min(seen))} and {number(max(seen))}."
    looks = Looks(name, alt, smooth=name == "grad", small=True)
    return page.figure(over_tokens(curves, looks), title)


def _curves(run: RunFolder, value: Callable[[StepRecord], float]) -> list[Curve]:
    """One curve a stage, over the tokens of all stages so far."""
    curves, before = [], 0
    for place, stage in enumerate(run.stages):
        x = [before + tokens for tokens in accumulate(r.tokens for r in stage.records)]
        label = f"{stage.name}, {stage.seqlen:,} tokens"
        curves.append(Curve(label, x, [value(r) for r in stage.records], place % 2))
        before = x[-1]
    return curves


def _resumes(run: RunFolder) -> list[tuple[float, str]]:
    """Where stages were resumed: tokens trained on by then, and the words for it."""
    marks, before = [], 0
    for stage in run.stages:
        for start in stage.header["starts"][1:]:
            done = sum(r.tokens for r in stage.records if r.step <= start["step"])
            marks.append((before + done, f"{stage.name} after step {start['step']:,}"))
        before += stage.tokens
    return marks


def _peaks(run: RunFolder) -> str:
    """What model FLOPs utilisation is a fraction of."""
    peak = run.stages[-1].header.get("peak")
    if not peak:
        return ""
    return (
        f"MFU is the fraction of the peak of all ranks, {amount(peak['flops'])}FLOP/s each "
        f"({peak['source']}); attention counted over the full square, or its causal half."
    )


def _median(records: Sequence[StepRecord], value: Callable[[StepRecord], float | None]) -> float:
    seen = [v for v in map(value, records) if v is not None and math.isfinite(v)]
    return statistics.median(seen) if seen else math.nan


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%" if math.isfinite(value) else "–"


def _seconds(run: RunFolder) -> float:
    return sum(record.time.step for stage in run.stages for record in stage.records)


def _day(stage: Stage) -> str:
    return str(stage.header["starts"][-1]["time"])[:10]
