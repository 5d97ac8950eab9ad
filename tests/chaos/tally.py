"""Count how often something was tried and survived, and write the counts as a table."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Results of one kind of fault.

    Attributes:
        kind: what was done.
        meaning: what "survived" means.
        tried: number of tries.
        failures: one line for each try that did not survive.
    """

    kind: str
    meaning: str
    tried: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def survived(self) -> int:
        """Number of tries that survived."""
        return self.tried - len(self.failures)

    def add(self, problem: str | None, tries: int = 1) -> None:
        """Count `tries` tries; `problem` says what went wrong with the last, None for nothing."""
        self.tried += tries
        if problem is not None:
            self.failures.append(problem)


def table(tallies: Sequence[Tally]) -> str:
    """Return the tallies as a Markdown table."""
    lines = ["| kind | tried | survived | survived means |", "| --- | --: | --: | --- |"]
    for tally in tallies:
        lines.append(f"| {tally.kind} | {tally.tried} | {tally.survived} | {tally.meaning} |")
    return "\n".join(lines)


def failures(tallies: Sequence[Tally]) -> list[str]:
    """Return a line for each try that did not survive."""
    return [f"{tally.kind}: {problem}" for tally in tallies for problem in tally.failures]
