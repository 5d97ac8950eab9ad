"""Lay the claims beside the measured figures: Markdown, JSON and plots."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from lcdist.claims.claim import Claim, Figure, Measured, Training, Verdict, decide
from lcdist.claims.jobs import ADAPTED
from lcdist.claims.plots import write_plots
from lcdist.utils.atomic import write_file

_BUDGETS = (0.1, 0.25, 0.5, 0.75, 1.0)
Cells = Sequence[Sequence[str]]
_MARKS = {"reproduced": "reproduced", "not reproduced": "**not reproduced**"}


def write_results(
    folder: Path,
    claims: Sequence[Claim],
    measured: Measured,
    facts: Mapping[str, str],
    timings: Cells = (),
) -> dict[str, Verdict]:
    """Write README.md, results.json and the plots.

    Args:
        folder: that gets the files.
        claims: in their order.
        measured: what was measured so far.
        facts: command, seed, commit, machine, versions and date.
        timings: as of `tensorized_times`.

    Returns:
        The verdict of each claim.
    """
    folder.mkdir(parents=True, exist_ok=True)
    verdicts = {claim.name: decide(claim, measured) for claim in claims}
    plots = write_plots(folder, measured)
    write_file(folder / "README.md", _markdown(claims, verdicts, measured, facts, plots, timings))
    table = {
        "facts": dict(facts),
        "claims": {name: asdict(verdict) for name, verdict in verdicts.items()},
        "measured": asdict(measured) | {"unigram": _finite(measured.unigram)},
    }
    write_file(folder / "results.json", json.dumps(table, indent=1, allow_nan=False) + "\n")
    return verdicts


def _markdown(
    claims: Sequence[Claim],
    verdicts: Mapping[str, Verdict],
    measured: Measured,
    facts: Mapping[str, str],
    plots: Mapping[str, str],
    timings: Cells,
) -> str:
    words = [verdict.word for verdict in verdicts.values()]
    counts = ", ".join(f"{words.count(w)} {w}" for w in (*_MARKS, "not decided"))
    lines = [
        "# Claims, beside our own figures",
        "",
        f"{counts}. [docs/claims.md](../../docs/claims.md) says how to read this page. The models "
        f"are small and trained at {measured.length} tokens: what is not reproduced may hold for "
        "large ones.",
        "",
        *_table(("fact", "value"), [(name, f"`{value}`") for name, value in facts.items()]),
        "## Claims",
        "",
        *_table(
            ("claim", "paper", "what is claimed", "the paper's figures", "asked here", "answer"),
            [_row(claim, verdicts[claim.name]) for claim in claims],
        ),
    ]
    for title, picture in plots.items():
        lines += [f"![{title}]({picture})", ""]
    lines += ["## Perplexity of held-out real text, by length", "", *_perplexities(measured)]
    lines += ["## Passkeys found, by length", "", *_passkeys(measured)]
    lines += ["## Landmark attention: blocks read", "", *_shares(measured)]
    lines += ["## Tensorized attention: time against full", "", *_times(timings)]
    lines += ["## Trainings", "", *_trainings(measured)]
    lines += ["## Training loss by budget", "", *_budgets(measured)]
    return "\n".join(lines).rstrip() + "\n"


def _row(claim: Claim, verdict: Verdict) -> tuple[str, ...]:
    paper = "ours"
    if claim.paper:
        paper = f"[arXiv:{claim.paper}](https://arxiv.org/abs/{claim.paper})"
    figures = f"{claim.figures} ({claim.source})" if claim.paper else "none"
    answer = f"{_MARKS.get(verdict.word, verdict.word)}: {verdict.why}"
    return f"`{claim.name}`", paper, claim.sentence, figures, claim.test, answer


def _perplexities(measured: Measured) -> list[str]:
    lengths = _lengths(reading.perplexity for reading in measured.readings.values())
    rows = []
    for name, reading in measured.readings.items():
        known = reading.perplexity
        rows.append((f"`{name}`", *(_perplexity(known.get(length)) for length in lengths)))
    return _table(("reading", *(f"{length:,}" for length in lengths)), rows)


def _passkeys(measured: Measured) -> list[str]:
    asked = {name: r.passkey for name, r in measured.readings.items() if r.passkey}
    lengths = _lengths(asked.values())
    rows = []
    for name, found in asked.items():
        cells = ("" if n not in found else f"{found[n].value:.0%}" for n in lengths)
        rows.append((f"`{name}`", *cells))
    return _table(("reading", *(f"{length:,}" for length in lengths)), rows)


def _shares(measured: Measured) -> list[str]:
    chosen = {name: r for name, r in measured.readings.items() if r.shares}
    rows = []
    for name, reading in chosen.items():
        for length, share in reading.shares.items():
            value = _perplexity(reading.perplexity.get(length))
            rows.append((f"`{name}`", f"{length:,}", f"{share:.1%}", value))
    return _table(("reading", "length", "of the blocks", "perplexity"), rows)


def _times(timings: Cells) -> list[str]:
    heads = ("device, date, commit", "options", "tokens", "full, ms", "tensorized, ms")
    return [
        "Attention alone, forward and backward. The paper's 11 times at 128 thousand tokens are of "
        "inference with a whole model, against FlashAttention-2: this decides nothing about them.",
        "",
        *_table((*heads, "times as fast"), timings),
    ]


def _trainings(measured: Measured) -> list[str]:
    rows = []
    for name, training in measured.trainings.items():
        tokens, loss = training.curve[-1]
        cells = (f"{tokens:,}", f"{training.flops / 1e12:.3g}", f"{training.seconds:.0f}")
        rows.append((f"`{name}`", *cells, f"{loss:.3f}"))
    return _table(("job", "tokens", "10¹² operations", "seconds", "last training loss"), rows)


def _budgets(measured: Measured) -> list[str]:
    """Return the training loss after parts of the tokens: which method learns as fast as softmax.

    The last column is the budget after which a method has the loss that `full` ends with.
    """
    rows = []
    base = measured.trainings.get("full")
    for name, training in measured.trainings.items():
        if name.startswith(ADAPTED):
            continue
        last = training.curve[-1][0]
        cells = [f"{loss_at(training, share * last):.3f}" for share in _BUDGETS]
        reached = "" if base is None else f"{reaches(training, loss_at(base, base.curve[-1][0]))}"
        rows.append((f"`{name}`", *cells, reached))
    heads = (f"{share:.0%} of the tokens" for share in _BUDGETS)
    return _table(("job", *heads, "has the last loss of `full` after"), rows)


def loss_at(training: Training, tokens: float) -> float:
    """Return the mean training loss over the last tenth of so many tokens."""
    found = [loss for at, loss in training.curve if 0.9 * tokens <= at <= tokens]
    # Of a short training no average ends there.
    return sum(found) / len(found) if found else min(training.curve, key=_far_from(tokens))[1]


def _far_from(tokens: float) -> Callable[[tuple[int, float]], float]:
    return lambda point: abs(point[0] - tokens)


def reaches(training: Training, loss: float) -> str:
    """Return the tokens after which the training loss is at most `loss`, in words."""
    for tokens, _ in training.curve:
        if loss_at(training, tokens) <= loss:
            return f"{tokens:,} tokens"
    return f"not within {training.curve[-1][0]:,} tokens"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table and an empty line; a sentence if it has no rows."""
    if not rows:
        return ["Nothing was measured yet.", ""]
    lines = [heads, ["---"] * len(heads), *rows]
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def _lengths(tables: Iterable[Mapping[int, Figure]]) -> list[int]:
    return sorted({length for table in tables for length in table})


def _perplexity(figure: Figure | None) -> str:
    if figure is None:
        return ""
    return f"{figure.value:.2f}" if figure.value < 1000 else f"{figure.value:,.0f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
