"""`python -m tests.chaos`: break everything that often, print the table and write it."""

import argparse
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.chaos.configurations import CONFIGURATIONS
from tests.chaos.damages import try_damages
from tests.chaos.documents import DOCUMENTS
from tests.chaos.inputs import Kind, try_inputs
from tests.chaos.kills import try_kills
from tests.chaos.models import MODELS
from tests.chaos.stdio import output_to
from tests.chaos.tally import Tally, failures, table
from tests.chaos.tokenizers import TOKENIZERS

ROOT = Path(__file__).resolve().parents[2]
KINDS: tuple[Kind, ...] = (CONFIGURATIONS, DOCUMENTS, MODELS, TOKENIZERS)
TEXT = """# What was broken on purpose, and what survived

Made by `make chaos` (`python -m tests.chaos`), which writes this file anew. {when}, commit
{commit}{changes}; {cpu}; seed {seed}.

{table}

Kills: {kills} asked for; the time from a start to its kill is drawn from an exponential
distribution with a mean of {mean:g} s. With two ranks, half of the kills hit one rank first.
Damages: a flipped bit, truncation, removal, zeros and foreign content, {damages} times for each
file. Generated inputs: {share:g} of the full counts, and before them those in
`tests/chaos/corpus`, which failed once.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how often everything is tried."""
    parser.add_argument("--kills", type=int, default=200, help="in all, over four kinds of runs")
    parser.add_argument("--mean-seconds", type=float, default=1.0, help="from a start to a kill")
    parser.add_argument("--damages", type=int, default=2, help="of every kind, for every file")
    parser.add_argument("--inputs-share", type=float, default=1.0, help="share of all inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="kills, damages, or names of inputs")
    parser.add_argument("--keep", type=Path, help="folder for generated inputs that failed")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "chaos.md")


def main(words: Sequence[str] | None = None) -> int:
    """Try everything; return 1 if anything did not survive."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    add_arguments(parser)
    arguments = parser.parse_args(words)
    # Now: it may take an hour, and the working tree may change meanwhile.
    circumstances, tallies = _circumstances(), list[Tally]()
    for done in _all(arguments):
        for tally in done:
            print(f"{tally.kind}: {tally.survived} of {tally.tried} survived", end="")
            print(f", {tally.refused} of them refused", flush=True)
            print(*(f"  {problem}" for problem in tally.failures), sep="\n", end="\n", flush=True)
        tallies += done
    text = TEXT.format(
        **circumstances,
        **{"seed": arguments.seed, "table": table(tallies), "share": arguments.inputs_share},
        **{"kills": arguments.kills, "mean": arguments.mean_seconds, "damages": arguments.damages},
    )
    arguments.out.write_text(text, encoding="utf-8")
    print(text)
    return 1 if failures(tallies) else 0


def _all(arguments: argparse.Namespace) -> Iterator[list[Tally]]:
    chance = random.Random(arguments.seed)

    def wanted(name: str) -> bool:
        return not arguments.only or name in arguments.only

    with tempfile.TemporaryDirectory(prefix="lcdist-chaos-") as place:
        home = Path(place)
        if arguments.kills and wanted("kills"):
            drawn = arguments.mean_seconds, chance
            yield try_kills(home / "kills", arguments.kills, drawn)
        if arguments.damages and wanted("damages"):
            yield try_damages(home / "damages", arguments.damages, chance)
        for kind in KINDS:
            if wanted(kind.name):
                count = round(kind.count * arguments.inputs_share)
                with output_to(home / "printed"):
                    tally = try_inputs(kind, count, arguments.seed, arguments.keep)
                yield [tally]


def _circumstances() -> dict[str, str]:
    """Return date, commit and CPU, without the name of the machine."""
    commit = _git("rev-parse", "--short=12", "HEAD") or "unknown"
    changes = " with changes" if _git("status", "--porcelain", "--untracked-files=no") else ""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = f"{len(models)} cores of {models[0]}" if models else "an unknown CPU"
    when = datetime.now(UTC).strftime("%Y-%m-%d")
    return {"commit": commit, "changes": changes, "cpu": cpu, "when": when}


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
