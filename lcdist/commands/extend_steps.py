"""What both ways of the main job have in common: stages in a folder, each done once and resumed.

Imported by extend.py beside it, whose folder Python puts first on the path.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lcdist.config.schema import Config
from lcdist.data.datasets.tokens import TokenSplit
from lcdist.distributed.mesh import end_world
from lcdist.evaluate.loaded_model import generate_text
from lcdist.evaluate.perplexity import held_out_text
from lcdist.report.sections import write_report
from lcdist.rundir.status import read_status

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "def parse_header(line):\n"
console = Console(highlight=False)


class Job:
    """Stages in `folder`, on `ranks` processes. titles: of all, in order. stages: training runs."""

    titles: Sequence[str] = ()
    stages: Sequence[str] = ()

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder, self.ranks = folder, ranks

    def claim_name(self, job: Mapping[str, Any]) -> None:
        """Refuse a folder that an earlier job with other settings or data has filled."""
        file = self.folder / "job.json"
        if file.exists() and json.loads(file.read_text(encoding="utf-8")) != job:
            raise ValueError(
                f"{self.folder} holds a job with other settings, data or number of ranks; "
                "choose another name (make extend NAME=...) or remove the folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")

    def title(self, name: str, more: str = "") -> None:
        """Say which stage begins."""
        place = f"{self.titles.index(name) + 1}/{len(self.titles)}"
        console.rule(f"{place} {name}{more}", align="left")

    def tokenize(self, text: str, *words: str) -> bool:
        """Text to tokens; whether it was still to be done, as all stages say."""
        if (self.folder / "data" / "meta.json").exists():
            return False
        self.title("tokenizing")
        call([*lcdist(), "tokenize", text, str(self.folder / "data"), *words])
        return True

    def check_text(self, extend: Config) -> None:
        """Refuse a text of which too little was held out, and not after the training."""
        asked = extend.evaluate
        held_out_text(TokenSplit(self.folder / "data", "valid"), max(asked.lengths), asked.tokens)

    def train(self, stage: str, title: str, words: Sequence[str], config: Config) -> bool:
        """The run `stage`. words: its configuration's file and overrides. config: the same."""
        folder, train = self.folder / stage, config.train
        status = read_status(folder)
        if status and status["status"] == "finished" and status["step"] >= train.steps:
            return False
        self.title(title, f" at {train.seqlen} tokens, {self.ranks} ranks")
        call([*torchrun(self.ranks), str(ROOT / "launch/train.py"), *words])
        status = read_status(folder)
        if status is None or status["status"] != "finished":
            raise ValueError(f"{stage} was told to stop; run the same command again to go on")
        return True

    def evaluate(self, extend: Config, before: str, more: Sequence[str], labels: dict) -> bool:
        """Perplexity by length of the runs `before` and extend. more: settings for both."""
        output = self.folder / "evaluation.json"
        if output.exists():
            return False
        lengths = ",".join(map(str, extend.evaluate.lengths))
        settings = [f"evaluate.lengths=[{lengths}]", f"evaluate.tokens={extend.evaluate.tokens}"]
        self.title("perplexity by length, before and after", f", {self.ranks} ranks")
        part = self.folder / "perplexity.json"
        words = ["evaluate", str(self.folder / "extend"), "--before", str(self.folder / before)]
        words += ["--output", str(part), *settings, *more]
        call([*torchrun(self.ranks), "-m", "lcdist", *words])
        found = json.loads(part.read_text(encoding="utf-8"))
        read = [found[key]["attention"] for key in ("before", "after")]
        table = {
            "lengths": found["after"]["lengths"],
            "before": found["before"]["perplexity"],
            "after": found["after"]["perplexity"],
            "attention": read[1] if read[0] == read[1] else f"{read[0]} before, {read[1]} after",
            "tokens": found["after"]["tokens"],
            **labels,
        }
        output.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        return True

    def sample(self) -> bool:
        """What the extended model writes after PROMPT."""
        output = self.folder / "sample.txt"
        if output.exists():
            return False
        self.title("a sample")
        text = generate_text(
            self.folder / "extend", PROMPT, [], max_new_tokens=128, temperature=0.8, seed=0
        )
        end_world()
        output.write_text(text + "\n", encoding="utf-8")
        console.print(text, markup=False)
        return True

    def report(self, fresh: bool) -> bool:
        """The report, where anything in it is new. Returns whether that is so."""
        if not fresh and (self.folder / "report.html").exists():
            return False
        self.title("report")
        write_report(self.folder)
        return True


def lcdist() -> list[str]:
    """The first words of a command."""
    return [sys.executable, "-m", "lcdist"]


def torchrun(ranks: int) -> list[str]:
    """The first words of a program on `ranks` processes."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, "-m", *launcher]


def call(words: Sequence[str]) -> None:
    """Run a program. Raises CalledProcessError where it does not end well."""
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    subprocess.run(words, check=True, env={"OMP_NUM_THREADS": threads, **os.environ})
