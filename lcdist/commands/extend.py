"""`lcdist extend`: extend a model's context, from text to a report.

    lcdist extend [--data DIR_OR_FILE] [--name NAME] [--method METHOD] [--lora RANK]
        [--configs DIR]
        [--model HF_FOLDER [--length TOKENS] [--minutes MINUTES] [section.key=value ...]]

Without --model, a small model is trained at 512 tokens first and extended to 4096. With --model, a
Hugging Face folder that contains its tokenizer is imported, and the extended model is exported. Its
length is four times the model's own, or two times where four do not fit, and as many steps are
trained as fit the minutes; a job of which nothing would fit is refused before it begins. All output
is in runs/NAME: data/, pretrain/ or model/, extend/, exported/, evaluation.json, sample.txt,
report.html. A finished stage is skipped and an interrupted one is resumed, so the same command can
always be repeated.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch

from lcdist.attention import METHODS
from lcdist.commands.endings import STARTER, USER_ERROR
from lcdist.commands.extend_choice import Asked
from lcdist.commands.extend_own_model import OwnModelJob
from lcdist.commands.extend_steps import ROOT, ExtendJob, console
from lcdist.commands.wording import MAKE
from lcdist.config import dump, load
from lcdist.hardware.device import has_cuda
from lcdist.plan import make_plan
from lcdist.report.sections import report_facts

AGAIN = "Run the same command again to continue."
MINUTES_ON_CPU, MINUTES_ON_GPU = 10.0, 60.0
MOST = {int: 2**40, float: 1e6}
Number = TypeVar("Number", int, float)
SEQLEN = "train.seqlen="


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the text, the model, the method and the settings."""
    parser.add_argument("--data", default="stdlib", help="text: folder, file or JSONL")
    parser.add_argument("--name", default="", help="name of the folder under runs/")
    parser.add_argument(
        "--configs",
        default=str(ROOT / "configs" / "quickstart"),
        help="folder with pretrain.toml and extend.toml",
    )
    parser.add_argument("--method", default="full", help="attention method")
    parser.add_argument("--model", default="", help="Hugging Face folder with its tokenizer")
    parser.add_argument(
        "--lora", type=int, default=0, help="rank of LoRA adapters; 0: train all weights"
    )
    parser.add_argument(
        "--length", default="", help="tokens to extend --model to (default: 4 or 2 times its own)"
    )
    parser.add_argument(
        "--minutes",
        default="",
        help="for training and evaluation of --model (default: 10; 60 on GPUs)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="override a setting of extend.toml",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run all stages that are not finished.

    Returns:
        0 if all stages are finished, else the exit status of the stage that failed.
    """
    if arguments.overrides and not arguments.model:
        raise ValueError(
            f"{arguments.overrides[0]}: settings go with --model; without it, edit a copy of "
            "configs/quickstart and name it with --configs"
        )
    if (arguments.length or arguments.minutes) and not arguments.model:
        raise ValueError(
            "these go with --model: --length, --minutes; else edit a copy of --configs"
        )
    if arguments.lora < 0:
        raise ValueError(f"--lora {arguments.lora}: must be 0 or more")
    start = time.monotonic()
    folder = Path("runs") / (arguments.name or _default_name(arguments))
    try:
        job, fresh = _run_job(folder, arguments)
    except subprocess.CalledProcessError as error:
        # The stage has printed what the user did wrong.
        if error.returncode != USER_ERROR:
            console.print(AGAIN)
        return error.returncode
    _print_summary(job, fresh, time.monotonic() - start)
    return 0


def _default_name(arguments: argparse.Namespace) -> str:
    name = "quickstart" if arguments.data == "stdlib" else Path(arguments.data).stem
    if arguments.model:
        name = Path(arguments.model).resolve().name
    method = f"-{arguments.method}" if arguments.method != "full" else ""
    lora = f"-lora{arguments.lora}" if arguments.lora else ""
    return f"{name}{method}{lora}"


def _run_job(folder: Path, arguments: argparse.Namespace) -> tuple[ExtendJob, bool]:
    """Run the job; return it and whether any stage had to run."""
    ranks, configs = _ranks(), Path(arguments.configs)
    if arguments.model:
        own_model, asked = OwnModelJob(folder, ranks, arguments.environment), _asked(arguments)
        own_model.open(Path(arguments.model), arguments.data)
        fresh = own_model.run(
            configs / "extend.toml",
            lambda length: _settings(arguments, length),
            arguments.overrides,
            asked,
            _typed(arguments),
        )
        return own_model, fresh
    settings = _settings(arguments, load(configs / "extend.toml").train.seqlen)
    quickstart = QuickstartJob(folder, ranks, arguments.environment)
    return quickstart, quickstart.run(configs, settings, arguments.data)


def _asked(arguments: argparse.Namespace) -> Asked:
    """Return length and minutes as the user gave them."""
    given = dict(word.partition("=")[::2] for word in arguments.overrides)
    if arguments.length and "train.seqlen" in given:
        raise ValueError(
            f"--length {arguments.length} and train.seqlen={given['train.seqlen']} both set the "
            "length: leave one out"
        )
    length = _number(arguments.length or given.get("train.seqlen", ""), int, "--length")
    minutes = _number(arguments.minutes, float, "--minutes")
    default = MINUTES_ON_GPU if has_cuda() else MINUTES_ON_CPU
    return Asked(length, default if minutes is None else minutes, frozenset(given))


def _number(text: str, kind: type[Number], name: str) -> Number | None:
    """Return the number that `text` gives, None if it is empty; raise ValueError if it is wrong."""
    if not text:
        return None
    try:
        number = kind(text)
    except ValueError:
        number = kind(0)
    if not 0 < number < MOST[kind]:
        what = "a whole number of tokens, such as 32768" if kind is int else "a number, such as 30"
        raise ValueError(f"{name} {text!r}: must be {what}")
    return number


def _typed(arguments: argparse.Namespace) -> tuple[str, str]:
    """Return the command to repeat on another machine, and the word that gives it a length."""
    words = {
        "MODEL": arguments.model,
        "DATA": arguments.data if arguments.data != "stdlib" else "",
        "METHOD": arguments.method if arguments.method != "full" else "",
        "LORA": str(arguments.lora or ""),
    }
    given = {key: shlex.quote(value) for key, value in words.items() if value}
    overrides = [word for word in arguments.overrides if not word.startswith(SEQLEN)]
    if arguments.environment.get(STARTER) == MAKE:
        more = {"WITH": shlex.quote(" ".join(overrides))} if overrides else {}
        return " ".join(["make extend", *map("=".join, {**given, **more}.items())]), "LENGTH="
    options = [f"--{key.lower()} {value}" for key, value in given.items()]
    return " ".join(["lcdist extend", *options, *map(shlex.quote, overrides)]), "--length "


class QuickstartJob(ExtendJob):
    """Train a small model, then extend it."""

    titles = ("tokenizing", "pretraining", "extending", "perplexity by length, before and after")
    titles += ("a sample", "report")
    runs = ("pretrain", "extend")

    def run(self, configs_folder: Path, settings: list[str], text: str) -> bool:
        """Run all stages in order; raise at the first failure.

        Args:
            configs_folder: folder with pretrain.toml and extend.toml.
            settings: `section.key=value` for both.
            text: folder or file of text.

        Returns:
            Whether any stage had to run.
        """
        files = {name: str(configs_folder / f"{name}.toml") for name in self.runs}
        settings = [*settings, f"data.path={self.folder / 'data'}"]
        settings += _landmark_vocabulary(files["pretrain"], settings)
        # Pretraining is data parallel: with four ranks each rank runs one sample of the four.
        micro_batch = ["train.micro_batch_size=1"] if self.ranks > 2 else []
        without_lora = [word for word in settings if not word.startswith("lora.")]
        start = [f"checkpoint.load={self.folder / 'pretrain'}", f"parallel.cp_size={self.ranks}"]
        overrides = {
            "pretrain": [*without_lora, *micro_batch, f"log.folder={self.folder / 'pretrain'}"],
            "extend": [*settings, f"log.folder={self.folder / 'extend'}", *start],
        }
        configs = {name: load(files[name], overrides[name]) for name in self.runs}
        # Report conflicting settings now instead of in the middle of the job.
        plans = {name: make_plan(config, self.ranks) for name, config in configs.items()}
        self.claim_folder({**{name: dump(c) for name, c in configs.items()}, "text": text})
        labels = {
            "before_label": f"trained at {configs['pretrain'].train.seqlen} tokens",
            "after_label": f"extended to {configs['extend'].train.seqlen}",
        }
        pieces = plans["pretrain"].shape.text_vocab_size
        fresh = [self.tokenize(text, "--vocab-size", str(pieces))]
        self.check_held_out_text(configs["extend"])
        for name, title in zip(self.runs, ("pretraining", "extending"), strict=True):
            fresh.append(self.train(name, title, [files[name], *overrides[name]], configs[name]))
        fresh.append(self.evaluate(configs["extend"], "pretrain", [], labels))
        fresh.append(self.sample())
        return self.report(any(fresh))


def _landmark_vocabulary(file: str, settings: list[str]) -> list[str]:
    """Return the override that adds one token to the vocabulary if the method needs landmarks."""
    config = load(file, settings)
    method = METHODS.get(config.attention.method)
    if method is None or "landmarks" not in method.supports:
        return []
    return [f"model.vocab_size={config.model.vocab_size + 1}"]


def _settings(arguments: argparse.Namespace, length: int) -> list[str]:
    """Return method, its sizes for a length (four chunks, sixteen blocks), and LoRA.

    LoRA has LongLoRA's settings (arXiv:2309.12307): embeddings and norms are trained in full.
    """
    sizes: Mapping[str, list[str]] = {
        "scca": [f"attention.chunk_size={length // 4}"],
        "tensorized": [f"attention.modes=[{length // 16}]"],
    }
    method, rank = arguments.method, arguments.lora
    settings = [f"attention.method={method}", *sizes.get(method, [])]
    in_full = ["lora.embeddings=true", "lora.norms=true"]
    return settings + ([f"lora.rank={rank}", f"lora.alpha={2 * rank}", *in_full] if rank else [])


def _ranks() -> int:
    """Return the number of ranks: 2 on a CPU; 1, 2 or 4 on a GPU machine, as it has GPUs."""
    gpus = torch.cuda.device_count()
    return max(n for n in (1, 2, 4) if n <= gpus) if gpus else 2


def _print_summary(job: ExtendJob, fresh: bool, seconds: float) -> None:
    """Print the result, the paths of all output and what to try next."""
    folder, own_model = job.folder, isinstance(job, OwnModelJob)
    facts = report_facts(folder)["headline"]
    console.rule("done" if fresh else "all was done before", align="left")
    before, after = (
        "not finite" if value is None else f"{value:.2f}"
        for value in (facts["before"], facts["after"])
    )
    console.print(
        f"perplexity at {facts['length']} tokens: {before} before, {after} after extension"
        + (f"; {seconds:.0f} s in all" if fresh else "")
    )
    lcdist = os.path.relpath(Path(sys.executable).parent / "lcdist")
    runs = f"{{{','.join(job.runs)}}}" if len(job.runs) > 1 else job.runs[0]
    console.print(f"report:       {folder}/report.html")
    console.print(f"metrics:      {folder}/{runs}/metrics.jsonl, TensorBoard files beside it")
    console.print(f"checkpoints:  {folder}/{runs}/checkpoints")
    if own_model:
        console.print(f"exported:     {folder}/exported, for transformers")
    console.print("Worth trying next:")
    console.print(f"  {lcdist} generate {folder}/extend --prompt 'class Reader:'", soft_wrap=True)
    if own_model:
        console.print(
            f"  {lcdist} plan {folder}/extend.toml --world-size 8 parallel.cp_size=8",
            soft_wrap=True,
        )
    else:
        plan = "plan configs/quickstart/extend.toml --world-size 8 parallel.cp_size=8"
        console.print(f"  {lcdist} {plan}")
        console.print("  make extend DATA=path/to/your/text NAME=mine")
        console.print("  make extend MODEL=path/to/a/hugging-face-model LORA=8")
