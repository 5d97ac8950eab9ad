"""The main job: a model that reads short texts learns to read 4096 tokens.

    python launch/extend.py [--data DIR_OR_FILE] [--name NAME] [--method METHOD] [--lora RANK]
        [--configs DIR] [--model HF_FOLDER [section.key=value ...]]

Without --model a small model is trained at 512 tokens first; with it, a Hugging Face folder of your
own, its tokenizer beside it, is imported, and the extended model exported again. Everything lands
in runs/NAME: data/, pretrain/ or model/, extend/, exported/, evaluation.json, sample.txt,
report.html. Each stage is skipped when it is done and resumed when it was interrupted, so the same
command is always the right one.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from lcdist.attention import METHODS
from lcdist.commands.extend_steps import ROOT, Job, console
from lcdist.commands.extend_own_model import OwnModel
from lcdist.config import dump, load
from lcdist.plan import make_plan
from lcdist.report.sections import report_facts

# What `lcdist` ends with when something asked of it cannot be done.
USER_ERROR = 2


def main() -> int:
    """Run what is left of the job; 0 when all is done, else the failing stage's status."""
    arguments = _parse()
    begun = time.monotonic()
    folder = Path("runs") / arguments.name
    try:
        job, fresh = _run(folder, arguments)
    except subprocess.CalledProcessError as error:
        console.print(f"[red]stopped[/]: exit status {error.returncode}; see the lines above.")
        if error.returncode != USER_ERROR:
            console.print("Run the same command again to go on from the last checkpoint.")
        return error.returncode or 1
    except (ValueError, FileNotFoundError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return USER_ERROR
    _conclude(job, fresh, time.monotonic() - begun)
    return 0


def _run(folder: Path, arguments: argparse.Namespace) -> tuple[Job, bool]:
    """The job, and whether anything of it was left to do."""
    ranks, configs = _ranks(), Path(arguments.configs)
    words = [*_method(arguments), *_lora(arguments.lora)]
    if arguments.model:
        own = OwnModel(folder, ranks, Path(arguments.model), arguments.data)
        return own, own.run(configs / "extend.toml", [*words, *arguments.overrides])
    job = Quickstart(folder, ranks, arguments.data)
    return job, job.run(configs, words)


class Quickstart(Job):
    """A small model is trained, then extended."""

    titles = ("tokenizing", "pretraining", "extending", "perplexity by length, before and after")
    titles += ("a sample", "report")
    stages = ("pretrain", "extend")

    def __init__(self, folder: Path, ranks: int, text: str) -> None:
        super().__init__(folder, ranks)
        self.text = text

    def run(self, folder: Path, words: list[str]) -> bool:
        """All stages in order; whether anything was left to do. Raises at the first failure.

        folder: with pretrain.toml and extend.toml. words: `section.key=value` over both.
        """
        files = {stage: str(folder / f"{stage}.toml") for stage in self.stages}
        words = [*words, f"data.path={self.folder / 'data'}"]
        words += _room_for_landmarks(files["pretrain"], words)
        # Pretraining is data parallel: with four ranks each runs one sample of the four.
        micro = ["train.micro_batch_size=1"] if self.ranks > 2 else []
        alone = [word for word in words if not word.startswith("lora.")]
        start = [f"checkpoint.load={self.folder / 'pretrain'}", f"parallel.cp_size={self.ranks}"]
        given = {
            "pretrain": [*alone, *micro, f"log.folder={self.folder / 'pretrain'}"],
            "extend": [*words, f"log.folder={self.folder / 'extend'}", *start],
        }
        configs = {stage: load(files[stage], given[stage]) for stage in self.stages}
        # Every contradiction now, and not from a launcher in the middle of the job.
        plans = {stage: make_plan(config, self.ranks) for stage, config in configs.items()}
        self.claim_name({**{stage: dump(c) for stage, c in configs.items()}, "text": self.text})
        labels = {
            "before_label": f"trained at {configs['pretrain'].train.seqlen} tokens",
            "after_label": f"extended to {configs['extend'].train.seqlen}",
        }
        pieces = plans["pretrain"].shape.text_vocab_size
        done = [self.tokenize(self.text, "--vocab-size", str(pieces))]
        self.check_text(configs["extend"])
        done += [
            *(
                self.train(stage, title, [files[stage], *given[stage]], configs[stage])
                for stage, title in zip(self.stages, ("pretraining", "extending"), strict=True)
            ),
            self.evaluate(configs["extend"], "pretrain", [], labels),
            self.sample(),
        ]
        return self.report(any(done))


def _room_for_landmarks(file: str, words: list[str]) -> list[str]:
    """A vocabulary one token larger than the text's, where the method puts landmarks in."""
    config = load(file, words)
    method = METHODS.get(config.attention.method)
    if method is None or "landmarks" not in method.supports:
        return []
    return [f"model.vocab_size={config.model.vocab_size + 1}"]


def _method(arguments: argparse.Namespace) -> list[str]:
    """The method, and what the long length wants of it: four chunks, sixteen blocks."""
    words = [word for word in arguments.overrides if word.startswith("train.seqlen=")]
    seqlen = load(Path(arguments.configs) / "extend.toml", words).train.seqlen
    settings = {
        "scca": [f"attention.chunk_size={seqlen // 4}"],
        "tensorized": [f"attention.modes=[{seqlen // 16}]"],
    }
    return [f"attention.method={arguments.method}", *settings.get(arguments.method, [])]


def _lora(rank: int) -> list[str]:
    """LongLoRA's setting (arXiv:2309.12307): embeddings and norms are trained whole."""
    beside = ["lora.embeddings=true", "lora.norms=true"]
    return [f"lora.rank={rank}", f"lora.alpha={2 * rank}", *beside] if rank else []


def _conclude(job: Job, fresh: bool, seconds: float) -> None:
    folder, own = job.folder, isinstance(job, OwnModel)
    facts = report_facts(folder)["headline"]
    console.rule("done" if fresh else "all was done before", align="left")
    console.print(
        f"perplexity at {facts['length']} tokens: {facts['before']:.2f} before, "
        f"{facts['after']:.2f} after extension" + (f"; {seconds:.0f} s in all" if fresh else "")
    )
    lcdist = os.path.relpath(Path(sys.executable).parent / "lcdist")
    stages = f"{{{','.join(job.stages)}}}" if len(job.stages) > 1 else job.stages[0]
    console.print(f"report:       {folder}/report.html")
    console.print(f"metrics:      {folder}/{stages}/metrics.jsonl, TensorBoard beside them")
    console.print(f"checkpoints:  {folder}/{stages}/checkpoints")
    if own:
        console.print(f"exported:     {folder}/exported, for transformers")
    console.print("Worth trying next:")
    console.print(f"  {lcdist} generate {folder}/extend --prompt 'class Reader:'", soft_wrap=True)
    if own:
        console.print(
            f"  {lcdist} plan {folder}/extend.toml --world-size 8 parallel.cp_size=8",
            soft_wrap=True,
        )
    else:
        plan = "plan configs/quickstart/extend.toml --world-size 8 parallel.cp_size=8"
        console.print(f"  {lcdist} {plan}")
        console.print("  make extend DATA=path/to/your/text NAME=mine")
        console.print("  make extend MODEL=path/to/a/hugging-face-model LORA=8")


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
    parser.add_argument("--model", default="", help="Hugging Face folder, with its tokenizer")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0: all weights")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="over extend.toml"
    )
    arguments = parser.parse_intermixed_args()
    if arguments.overrides and not arguments.model:
        parser.error("section.key=value goes with --model; else edit a copy of --configs")
    if arguments.lora < 0:
        parser.error(f"--lora {arguments.lora}: must be 0 or more")
    if not arguments.name:
        source = "quickstart" if arguments.data == "stdlib" else Path(arguments.data).stem
        source = Path(arguments.model).resolve().name if arguments.model else source
        lora = f"-lora{arguments.lora}" if arguments.lora else ""
        arguments.name = source + f"-{arguments.method}" * (arguments.method != "full") + lora
    return arguments


def _ranks() -> int:
    """Two processes on a CPU; one, two or four on a GPU machine, as it has GPUs."""
    gpus = torch.cuda.device_count()
    return max(n for n in (1, 2, 4) if n <= gpus) if gpus else 2
