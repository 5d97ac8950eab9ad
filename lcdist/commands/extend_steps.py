"""Stages of `lcdist extend`: each is run once, and resumed if it was interrupted."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lcdist.commands.console import plain_console
from lcdist.commands.evaluate import unit_files
from lcdist.config.schema import Config
from lcdist.data.datasets.split import TokenSplit
from lcdist.distributed.mesh import end_world
from lcdist.evaluate.continuation import generate_text
from lcdist.evaluate.text import held_out_text
from lcdist.inference.sampling import Sampling
from lcdist.inference.settings import Generation
from lcdist.report.sections import write_report
from lcdist.rundir.status import read_status

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "def parse_header(line):\n"
console = plain_console(highlight=False)
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ExtendJob:
    """A folder of stages; training and evaluation run on `ranks` processes.

    Every stage method returns whether the stage had to run. `environment` is the environment of the
    programs that stages start. `titles` are the titles of all stages in order, `runs` the names of
    the training runs.
    """

    titles: Sequence[str] = ()
    runs: Sequence[str] = ()

    def __init__(self, folder: Path, ranks: int, environment: Mapping[str, str]) -> None:
        self.folder, self.ranks, self.environment = folder, ranks, environment

    def claim_folder(self, job: Mapping[str, Any]) -> None:
        """Write job.json; raise ValueError if the folder holds a different job."""
        before = self.read_job()
        if before and before != job:
            self.refuse_folder()
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(job, indent=1) + "\n"
        (self.folder / "job.json").write_text(text, encoding="utf-8")

    def read_job(self) -> dict[str, Any]:
        """Return the content of job.json; an empty table for a new job."""
        file = self.folder / "job.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def refuse_folder(self) -> NoReturn:
        """Raise ValueError: the folder holds a different job."""
        raise ValueError(
            f"{self.folder} holds a job with other settings, data or number of ranks; "
            "choose another --name, or remove the folder"
        )

    def print_title(self, name: str, more: str = "") -> None:
        """Print the number and the title of the stage that begins."""
        number = f"{self.titles.index(name) + 1}/{len(self.titles)}"
        console.rule(f"{number} {name}{more}", align="left")

    def tokenize(self, text: str, *options: str) -> bool:
        """Convert `text` to the folder data/."""
        if (self.folder / "data" / "meta.json").exists():
            return False
        self.print_title("tokenizing")
        self.start([*LCDIST, "tokenize", text, str(self.folder / "data"), *options])
        return True

    def check_held_out_text(self, config: Config) -> None:
        """Raise ValueError if too little text is held out for the evaluation of `config`."""
        settings = config.evaluate
        split = TokenSplit(self.folder / "data", "valid")
        held_out_text(split, max(settings.lengths), settings.tokens)

    def train(self, name: str, title: str, words: Sequence[str], config: Config) -> bool:
        """Train the run `name`.

        Args:
            name: of the run's folder.
            title: of the stage.
            words: configuration file and overrides.
            config: the configuration that `words` give.
        """
        folder = self.folder / name
        status = read_status(folder)
        if status and status["status"] == "finished" and status["step"] >= config.train.steps:
            return False
        self.print_title(title, f" at {config.train.seqlen} tokens, {self.ranks} ranks")
        self.start([*launcher(self.ranks), str(ROOT / "launch/train.py"), *words])
        status = read_status(folder)
        if status is None or status["status"] != "finished":
            raise ValueError(f"{name} was told to stop; run the same command again to continue")
        return True

    def evaluate(self, config: Config, before: str, more: Sequence[str], labels: dict) -> bool:
        """Write evaluation.json: perplexity by length of two checkpoints.

        Args:
            config: of the extended run.
            before: name of the run or model that extend/ is compared with.
            more: overrides for both.
            labels: entries `before_label` and `after_label` for the report.
        """
        output = self.folder / "evaluation.json"
        if output.exists():
            return False
        lengths = ",".join(map(str, config.evaluate.lengths))
        settings = [f"evaluate.lengths=[{lengths}]", f"evaluate.tokens={config.evaluate.tokens}"]
        self.print_title("perplexity by length, before and after", f", {self.ranks} ranks")
        results_file = self.folder / "perplexity.json"
        words = ["evaluate", str(self.folder / "extend"), "--before", str(self.folder / before)]
        words += ["--output", str(results_file), *settings, *more]
        self.start([*launcher(self.ranks), "-m", "lcdist", *words])
        results = json.loads(results_file.read_text(encoding="utf-8"))
        attention = [results[key]["attention"] for key in ("before", "after")]
        if attention[0] != attention[1]:
            attention = [f"{attention[0]} before, {attention[1]} after"]
        table = {
            "lengths": results["after"]["lengths"],
            "before": results["before"]["perplexity"],
            "after": results["after"]["perplexity"],
            "attention": attention[0],
            "tokens": results["after"]["tokens"],
            **labels,
        }
        output.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        for file in unit_files(results_file, 2):
            file.unlink(missing_ok=True)
        return True

    def sample(self) -> bool:
        """Write sample.txt: PROMPT continued by the extended model."""
        output = self.folder / "sample.txt"
        if output.exists():
            return False
        self.print_title("a sample")
        how = Generation(128, Sampling(0.8))
        [text] = generate_text(self.folder / "extend", [PROMPT], [], how).texts
        end_world()
        output.write_text(text + "\n", encoding="utf-8")
        console.print(text)
        return True

    def report(self, fresh: bool) -> bool:
        """Write report.html if it is missing or any stage has run (`fresh`)."""
        if not fresh and (self.folder / "report.html").exists():
            return False
        self.print_title("report")
        write_report(self.folder)
        return True

    def start(self, words: Sequence[str]) -> None:
        """Run a program; raise CalledProcessError if it fails."""
        threads = str(max(1, (os.cpu_count() or 1) // 2))
        run_program(words, {"OMP_NUM_THREADS": threads, **self.environment})


LCDIST = (sys.executable, "-m", "lcdist")


def launcher(ranks: int) -> list[str]:
    """Return the first words of a command that runs a program on `ranks` processes."""
    run = str(ROOT / "launch/run.py")
    return [sys.executable, run, "--standalone", "--nproc-per-node", str(ranks)]


def run_program(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a program; raise CalledProcessError if it fails.

    It is in a process group of its own and gets the signals of this process, so that it can save
    before both end.
    """
    with subprocess.Popen(words, env=environment, process_group=0) as program:
        before = {
            number: signal.signal(number, lambda number, _: program.send_signal(number))
            for number in FORWARDED
        }
        try:
            status = program.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if status:
        raise subprocess.CalledProcessError(status if status > 0 else 128 - status, words)
