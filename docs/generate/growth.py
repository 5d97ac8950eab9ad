"""Make the tables of how well small models read beyond their length, from the claims' results."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docs.generate.repository import ROOT
from docs.generate.tables import code, markdown_table
from lcdist.claims.claim import Figure, Measured, Reading
from lcdist.claims.jobs import ADAPTED, EXTENDED, all_jobs
from lcdist.claims.rules import growth, ratio
from lcdist.report.section import with_interval

FULL = "full"


def claims_growth(root: Path = ROOT) -> str:
    """Return the tables of each profile whose results are committed, or that there are none."""
    files = sorted((root / "claims").glob("*/results.json"))
    made = [_tables(file, json.loads(file.read_text(encoding="utf-8"))) for file in files]
    return "\n\n".join(made) or "No results are committed yet: unmeasured."


def _tables(file: Path, table: Mapping[str, Any]) -> str:
    """Return what a profile's models do beyond their length, and after an extension."""
    measured = _measured(table["measured"])
    length = measured.length
    longest = max(max(reading.perplexity) for reading in measured.readings.values())
    jobs = all_jobs(length)
    names = [read.name for job in jobs for read in job.reads if not job.start]
    known = measured.readings
    rows = [
        (
            code(name),
            *_perplexities(known[name], length, longest),
            _shown(growth(measured, name, longest // length)),
        )
        for name in names
        if name in known
    ]
    head = ("reading", f"at {length:,}", f"at {longest:,}", "times, 95 %")
    numbers = range(1, len(head))
    profile = file.parent.name
    parts = [
        f"Perplexity of models of the profile `{profile}`, trained at {length:,} tokens "
        f"([all figures](../claims/{profile}/README.md)):",
        markdown_table(head, rows, numbers),
    ]
    extended = [job.reads[0].name for job in jobs if job.start and job.reads[0].name in known]
    best = ADAPTED + FULL
    if best in extended:
        at = EXTENDED * length
        rows = [
            (
                code(name.removeprefix(ADAPTED)),
                *_perplexities(known[name], at),
                _shown(ratio(measured, [(name, EXTENDED)], [(best, EXTENDED)])),
            )
            for name in extended
        ]
        head = ("extended with", f"at {at:,}", f"over `{FULL}`, 95 %")
        parts += [
            f"The model `{FULL}` extended to {at:,} tokens with position interpolation and LoRA, "
            "read densely; with `-flops` for as many operations as `s2` takes, else for equal "
            "tokens:",
            markdown_table(head, rows, range(1, len(head))),
        ]
    return "\n\n".join(parts)


def _measured(table: Mapping[str, Any]) -> Measured:
    """Return perplexities and their pieces as the rules of the claims take them."""
    readings = {
        name: Reading(
            {int(at): Figure(found["value"]) for at, found in reading["perplexity"].items()},
            pieces={
                int(at): [(tokens, nats) for tokens, nats in pieces]
                for at, pieces in reading["pieces"].items()
            },
        )
        for name, reading in table["readings"].items()
    }
    return Measured(table["length"], table["unigram"], table["decides"], readings)


def _perplexities(reading: Reading, *lengths: int) -> list[str]:
    return [
        f"{reading.perplexity[at].value:.2f}" if at in reading.perplexity else "not finite"
        for at in lengths
    ]


def _shown(figure: Figure) -> str:
    return with_interval(figure.value, figure.interval) if math.isfinite(figure.value) else ""
