"""Make the answers to the papers' claims from the results that `make claims` wrote."""

import json
from collections import Counter
from pathlib import Path

from docs.generate.repository import ROOT
from docs.generate.tables import code, markdown_table
from lcdist.claims.registry import CLAIMS

RESULTS = "results.json"


def claims_results(root: Path = ROOT) -> str:
    """Return the answers of each profile with committed results, or that there are none."""
    files = sorted((root / "claims").glob(f"*/{RESULTS}"))
    parts = [_profile(file) for file in files]
    return "\n\n".join(parts) or "No results are committed yet: unmeasured."


def _profile(file: Path) -> str:
    found = json.loads(file.read_text(encoding="utf-8"))
    profile, answers = file.parent.name, found["claims"]
    counts = Counter(answer["word"] for answer in answers.values())
    facts = "; ".join(f"{name}: {code(value)}" for name, value in found["facts"].items())
    sentences = {claim.name: claim.sentence for claim in CLAIMS}
    rows = [
        (code(name), sentences.get(name, ""), answer["word"], answer["why"])
        for name, answer in answers.items()
    ]
    return (
        f"### Profile `{profile}`\n\n"
        f"{', '.join(f'{count} {word}' for word, count in counts.items())}. "
        f"[All figures and plots](../claims/{profile}/README.md). {facts}.\n\n"
        + markdown_table(("claim", "what is claimed", "answer", "why"), rows)
    )
