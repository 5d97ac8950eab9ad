"""Make the table of SmolLM2-135M, as it is and adapted to each method, from committed readings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docs.generate.repository import ROOT
from docs.generate.tables import code, markdown_table
from lcdist.attention.registry import BUILT_IN
from lcdist.report.section import with_interval
from lcdist.utils.intervals import exp_interval, mean_interval, perplexity_of

AS_IT_IS = "as-it-is"
_FACTS = "facts.json"


def smollm2_table(root: Path = ROOT) -> str:
    """Return perplexity by length, and its ratio to that of the model as it is."""
    folder = root / "claims" / "smollm2"
    names = [AS_IT_IS, *(method.name for method in BUILT_IN)]
    read = {n: _reading(folder / f"{n}.json") for n in names if (folder / f"{n}.json").exists()}
    if AS_IT_IS not in read:
        return "No results are committed yet: unmeasured."
    lengths = read[AS_IT_IS]["lengths"]
    facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    told = "; ".join(f"{name}: {code(value)}" for name, value in facts.items())
    longest = f"{max(lengths):,}"
    head = ("model", *(f"{length:,}" for length in lengths), f"ratio at {longest}, 95 %")
    rows = []
    for name in names:
        label = "as it is" if name == AS_IT_IS else code(name)
        if name not in read:
            rows.append((label, *["unmeasured"] * (len(lengths) + 1)))
            continue
        cells = (f"{value:,.2f}" for value in read[name]["perplexity"])
        rows.append((label, *cells, _ratio(read[name], read[AS_IT_IS])))
    tokens = read[AS_IT_IS]["scored"][0]
    return f"Perplexity of {tokens:,} held-out tokens by length. {told}.\n\n" + markdown_table(
        head, rows, range(1, len(lengths) + 1)
    )


def _reading(file: Path) -> Mapping[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))["measured"]["perplexity"]


def _ratio(after: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """Return the ratio of two perplexities at the longest length over the same pieces of text."""
    pairs = list(zip(after["stretches"][-1], before["stretches"][-1], strict=True))
    mean, interval = mean_interval([b[0] for _, b in pairs], [a[1] - b[1] for a, b in pairs])
    return with_interval(perplexity_of(mean), exp_interval(interval))
