"""The main job: text to tokens, a small model trained at 512 tokens, its context extended to 4096.

    python launch/extend.py [--data DIR_OR_FILE] [--name NAME] [--method METHOD] [--configs DIR]

Everything lands in runs/NAME: data/, pretrain/, extend/, evaluation.json, sample.txt, report.html.
Each stage is skipped when it is done and resumed when it was interrupted, so the same command is
always the right one.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from lcdist.attention import METHODS
from lcdist.config import dump, load
from lcdist.config.schema import Config
from lcdist.evaluate.report import report_facts, write_report
from lcdist.evaluate.session import generate_text
from lcdist.parallel import end_world
from lcdist.plan import make_plan
from lcdist.train.folder import read_status

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "def parse_header(line):\n"
# What the quickstart's lengths want of a method: four chunks, and sixteen blocks, of the long one.
SETTINGS = {
    "scca": ["attention.chunk_size=1024"],
    "tensorized": ["attention.modes=[256]"],
}
# What `lcdist` ends with when something asked of it cannot be done.
USER_ERROR = 2
console = Console(highlight=False)


def main() -> int:
    """Run what is left of the job; 0 when all is done, else the failing stage's status."""
    arguments = _parse()
    begun = time.monotonic()
    folder = Path("runs") / arguments.name
    ranks = _ranks()
    job = _Job(folder, arguments, ranks)
    try:
        fresh = job.run()
    except subprocess.CalledProcessError as error:
        console.print(f"[red]stopped[/]: exit status {error.returncode}; see the lines above.")
        if error.returncode != USER_ERROR:
            console.print("Run the same command again to go on from the last checkpoint.")
        return error.returncode or 1
    except (ValueError, FileNotFoundError) as error:
        console.print(f"error: {error}", style="red")
        return USER_ERROR
    _conclude(folder, fresh, time.monotonic() - begun)
    return 0


class _Job:
    """The stages of one job in `folder`, on `ranks` processes."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, ranks: int) -> None:
        self.folder, self.ranks, self.data = folder, ranks, arguments.data
        self.configs = Path(arguments.configs)
        common = [f"attention.method={arguments.method}", f"data.path={folder / 'data'}"]
        common += SETTINGS.get(arguments.method, [])
        common += self._room_for_landmarks(common)
        # Pretraining is data parallel: with four ranks each runs one sample of the four.
        micro = ["train.micro_batch_size=1"] if ranks > 2 else []
        self.pretrain = [*common, *micro, f"log.folder={folder / 'pretrain'}"]
        self.extend = [
            *common,
            f"log.folder={folder / 'extend'}",
            f"checkpoint.load={folder / 'pretrain'}",
            f"parallel.cp_size={ranks}",
        ]

    def _room_for_landmarks(self, common: list[str]) -> list[str]:
        """A vocabulary one token larger than the text's, where the method puts landmarks in."""
        config = load(self.configs / "pretrain.toml", common)
        method = METHODS.get(config.attention.method)
        if method is None or "landmarks" not in method.supports:
            return []
        return [f"model.vocab_size={config.model.vocab_size + 1}"]

    def run(self) -> bool:
        """All stages in order; whether anything was left to do. Raises at the first failure."""
        configs = {
            "pretrain": load(self.configs / "pretrain.toml", self.pretrain),
            "extend": load(self.configs / "extend.toml", self.extend),
        }
        for config in configs.values():
            # Every contradiction now, and not from a launcher in the middle of the job.
            make_plan(config, self.ranks)
        self._claim_name(configs)
        done = [
            self._tokenize(configs["pretrain"]),
            self._train("2/6 pretraining", "pretrain", self.pretrain, configs),
            self._train("3/6 extending", "extend", self.extend, configs),
            self._evaluate(configs["pretrain"], configs["extend"]),
            self._sample(),
        ]
        report = self.folder / "report.html"
        if any(done) or not report.exists():
            self._stage("6/6 report")
            write_report(self.folder)
            return True
        return False

    def _claim_name(self, configs: dict[str, Config]) -> None:
        """Refuse a folder that an earlier job with other settings or data has filled."""
        job = {name: dump(config) for name, config in configs.items()}
        job["text"] = self.data
        file = self.folder / "job.json"
        if file.exists() and json.loads(file.read_text(encoding="utf-8")) != job:
            raise ValueError(
                f"{self.folder} holds a job with other settings, data or number of ranks; "
                "choose another name (make extend NAME=...) or remove the folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")

    def _stage(self, title: str) -> None:
        console.rule(title, align="left")

    def _tokenize(self, config: Config) -> bool:
        if (self.folder / "data" / "meta.json").exists():
            return False
        self._stage("1/6 tokenizing")
        pieces = make_plan(config, self.ranks).text_vocab_size
        words = [self.data, str(self.folder / "data"), "--vocab-size", str(pieces)]
        _call([*_lcdist(), "tokenize", *words])
        return True

    def _train(
        self, title: str, stage: str, overrides: Sequence[str], configs: dict[str, Config]
    ) -> bool:
        folder, train = self.folder / stage, configs[stage].train
        status = read_status(folder)
        if status and status["status"] == "finished" and status["step"] >= train.steps:
            return False
        self._stage(f"{title} at {train.seqlen} tokens, {self.ranks} ranks")
        config = str(self.configs / f"{stage}.toml")
        _call([*_torchrun(self.ranks), str(ROOT / "launch/train.py"), config, *overrides])
        status = read_status(folder)
        if status is None or status["status"] != "finished":
            raise ValueError(f"{stage} was told to stop; run the same command again to go on")
        return True

    def _evaluate(self, pretrain: Config, extend: Config) -> bool:
        output = self.folder / "evaluation.json"
        if output.exists():
            return False
        lengths = ",".join(map(str, extend.evaluate.lengths))
        settings = [f"evaluate.lengths=[{lengths}]", f"evaluate.tokens={extend.evaluate.tokens}"]
        self._stage(f"4/6 perplexity by length, before and after, {self.ranks} ranks")
        part = self.folder / "perplexity.json"
        words = ["evaluate", str(self.folder / "extend"), "--before", str(self.folder / "pretrain")]
        _call([*_torchrun(self.ranks), "-m", "lcdist", *words, "--output", str(part), *settings])
        found = json.loads(part.read_text(encoding="utf-8"))
        table = {
            "lengths": found["after"]["lengths"],
            "before": found["before"]["perplexity"],
            "after": found["after"]["perplexity"],
            "attention": found["after"]["attention"],
            "tokens": found["after"]["tokens"],
            "before_label": f"trained at {pretrain.train.seqlen} tokens",
            "after_label": f"extended to {extend.train.seqlen}",
        }
        output.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        return True

    def _sample(self) -> bool:
        output = self.folder / "sample.txt"
        if output.exists():
            return False
        self._stage("5/6 a sample")
        text = generate_text(
            self.folder / "extend", PROMPT, [], max_new_tokens=128, temperature=0.8, seed=0
        )
        end_world()
        output.write_text(text + "\n", encoding="utf-8")
        console.print(text, markup=False)
        return True


def _conclude(folder: Path, fresh: bool, seconds: float) -> None:
    facts = report_facts(folder)["headline"]
    console.rule("done" if fresh else "all was done before", align="left")
    console.print(
        f"perplexity at {facts['length']} tokens: {facts['before']:.2f} before, "
        f"{facts['after']:.2f} after extension" + (f"; {seconds:.0f} s in all" if fresh else "")
    )
    lcdist = Path(sys.executable).parent / "lcdist"
    shown = os.path.relpath(lcdist)
    console.print(f"report:       {folder}/report.html")
    console.print(
        f"metrics:      {folder}/{{pretrain,extend}}/metrics.jsonl, TensorBoard beside them"
    )
    console.print(f"checkpoints:  {folder}/{{pretrain,extend}}/checkpoints")
    console.print("Worth trying next:")
    console.print(f"  {shown} generate {folder}/extend --prompt 'class Reader:'")
    console.print(
        f"  {shown} plan configs/quickstart/extend.toml --world-size 8 parallel.cp_size=8"
    )
    console.print("  make extend DATA=path/to/your/text NAME=mine")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="stdlib", help="text: folder, file or JSONL")
    parser.add_argument("--name", default="", help="of the folder under runs/")
    parser.add_argument(
        "--configs",
        default=str(ROOT / "configs" / "quickstart"),
        help="folder with pretrain.toml and extend.toml",
    )
    parser.add_argument("--method", default="full", help="attention method")
    arguments = parser.parse_args()
    if not arguments.name:
        source = "quickstart" if arguments.data == "stdlib" else Path(arguments.data).stem
        arguments.name = source if arguments.method == "full" else f"{source}-{arguments.method}"
    return arguments


def _ranks() -> int:
    """Two processes on a CPU; one, two or four on a GPU machine, as it has GPUs."""
    gpus = torch.cuda.device_count()
    return max(n for n in (1, 2, 4) if n <= gpus) if gpus else 2


def _lcdist() -> list[str]:
    return [sys.executable, "-m", "lcdist"]


def _torchrun(ranks: int) -> list[str]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, "-m", *launcher]


def _call(words: Sequence[str]) -> None:
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    subprocess.run(words, check=True, env={"OMP_NUM_THREADS": threads, **os.environ})


if __name__ == "__main__":
    sys.exit(main())
