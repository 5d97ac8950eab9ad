"""Make the answers to the papers' claims from the results that `make claims` wrote."""

import json
from collections import Counter
from pathlib import Path

from docs.generate.repository import ROOT
from docs.generate.tables import code, markdown_table
from lcdist.claims.registry import CLAIMS

PAGE, RESULTS = "README.md", "results.json"


def claims_results(root: Path = ROOT) -> str:
    """Return the answers of each folder of committed results, or that there are none."""
    pages = sorted((root / "claims").glob(f"*/{PAGE}"))
    return "\n\n".join(map(_folder, pages)) or "No results are committed yet: unmeasured."


def _folder(page: Path) -> str:
    """Return a link to a page of results, and the answers if they are beside it."""
    name, file = page.parent.name, page.with_name(RESULTS)
    title = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    link = f"### `{name}`\n\n[{title}](../claims/{name}/{PAGE})"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    answers = found.get("claims", {})
    if not answers:
        return link
    counts = Counter(answer["word"] for answer in answers.values())
    facts = "; ".join(f"{fact}: {code(value)}" for fact, value in found["facts"].items())
    sentences = {claim.name: claim.sentence for claim in CLAIMS}
    rows = [
        (code(name), sentences.get(name, ""), answer["word"], answer["why"])
        for name, answer in answers.items()
    ]
    return (
        f"{link}: {', '.join(f'{count} {word}' for word, count in counts.items())}. {facts}.\n\n"
        + markdown_table(("claim", "what is claimed", "answer", "why"), rows)
    )
