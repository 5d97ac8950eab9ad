"""Count how often something was tried and survived, and write the counts as a table."""

from collections.abc import Sequence
from dataclasses import dataclass, field

# Survived, with a message that names what is wrong.
REFUSED = "refused"


@dataclass
class Tally:
    """Results of one kind of fault.

    Attributes:
        kind: what was done.
        meaning: what "survived" means.
        tried: number of tries.
        failures: one line for each try that did not survive.
        refused: number of survivors that ended with a message instead of going on.
    """

    kind: str
    meaning: str
    tried: int = 0
    failures: list[str] = field(default_factory=list)
    refused: int = 0

    @property
    def survived(self) -> int:
        """Number of tries that survived."""
        return self.tried - len(self.failures)

    def add(self, problem: str | None, tries: int = 1) -> None:
        """Count tries.

        Args:
            problem: what went wrong with the last; `REFUSED` or None for nothing.
            tries: number of tries.
        """
        self.tried += tries
        if problem == REFUSED:
            self.refused += 1
        elif problem is not None:
            self.failures.append(problem)


def told(problem: str | None, what: str) -> str | None:
    """Return a problem with what was tried before it."""
    return problem if problem in (None, REFUSED) else f"{what}: {problem}"


def table(tallies: Sequence[Tally]) -> str:
    """Return the tallies as a Markdown table, and below it what "survived" means."""
    meanings = list(dict.fromkeys(tally.meaning for tally in tallies))
    lines = [
        "| what was tried | tried | survived | of these refused with a message | survived means |",
        "| --- | --: | --: | --: | --: |",
    ]
    for tally in tallies:
        counts = f"{tally.tried} | {tally.survived} | {tally.refused}"
        lines.append(f"| {tally.kind} | {counts} | {meanings.index(tally.meaning) + 1} |")
    named = [f"{number}. {meaning}" for number, meaning in enumerate(meanings, 1)]
    return "\n".join([*lines, "", "Survived means:", "", *named])


def failures(tallies: Sequence[Tally]) -> list[str]:
    """Return a line for each try that did not survive."""
    return [f"{tally.kind}: {problem}" for tally in tallies for problem in tally.failures]
