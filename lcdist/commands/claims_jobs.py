"""Run the jobs of `lcdist claims`: train or adapt a model, and read it in every way asked for."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcdist.claims.jobs import Job, Read
from lcdist.claims.profiles import Profile
from lcdist.claims.results import COSTS, TEXT, is_trained, reading_file, run_folders
from lcdist.claims.text import MADE, REAL
from lcdist.commands.console import plain_console
from lcdist.commands.stages import run_stages
from lcdist.config.load import load
from lcdist.config.schema import Config
from lcdist.config.stages import Stage
from lcdist.distributed.mesh import end_world
from lcdist.evaluate.evaluation import Kept, evaluate_checkpoint
from lcdist.plan import make_plan
from lcdist.rundir.source import load_run
from lcdist.utils.atomic import write_file
from lcdist.utils.progress import TOKENS, progress_console, show_progress

console = plain_console(highlight=False)
EXTENSION_OF_EQUAL_WORK = "extend-s2"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_POLL_SECONDS = 0.2
_SEQLEN, _TOP_K, _BLOCK_SIZE = "train.seqlen=", "attention.top_k=", "attention.block_size="


@dataclass(frozen=True)
class Place:
    """Describe where the jobs of a profile run.

    Attributes:
        folder: with the text, a folder for each job and the readings.
        file: configuration of the profile.
        overrides: of the user, for all trainings.
        profile: sizes.
        jobs: all jobs of the profile, by name.
    """

    folder: Path
    file: Path
    overrides: tuple[str, ...]
    profile: Profile
    jobs: Mapping[str, Job]

    @property
    def config(self) -> Config:
        """The configuration that all jobs override."""
        return load(self.file, self.overrides)

    def words(self, job: Job) -> list[str]:
        """Return the overrides of a training, but for its number of steps at equal work."""
        texts = self.folder / TEXT
        data = [f"data.path={texts / REAL}"]
        data += [f"data.mixture.{name}.path={texts / name}" for name in (REAL, MADE)]
        words = [*data, *self.overrides, *job.words, f"log.folder={self.folder / job.name}"]
        config = self.config
        if "attention.method=landmark" in job.words:
            words.append(f"model.vocab_size={config.model.vocab_size + 1}")
        if job.start:
            [start] = run_folders(self.folder / job.start)
            # The same tokens a step as before.
            tokens = config.train.global_batch_size * config.train.seqlen
            samples = max(1, tokens // number_of(job.words, _SEQLEN))
            batch = [f"train.global_batch_size={samples}", "train.micro_batch_size=1"]
            words += [*batch, *self.profile.adapting, f"checkpoint.load={start}"]
        return words

    def stages(self, job: Job) -> tuple[Stage, ...]:
        """Return the configurations of a job's training."""
        if job.powers:
            return load_run(self._staged_file(job), self.words(job))
        words = self.words(job)
        if job.equal_flops:
            words.append(f"train.steps={self._equal_steps(job)}")
        return load_run(self.file, words)

    def _equal_steps(self, job: Job) -> int:
        """Return the steps that cost what those of the extension with S2-Attn cost."""
        [own] = load_run(self.file, self.words(job))
        [other] = load_run(self.file, self.words(self.jobs[EXTENSION_OF_EQUAL_WORK]))
        return max(1, round(own.config.train.steps * flops(other.config) / flops(own.config)))

    def _staged_file(self, job: Job) -> Path:
        """Write the profile's configuration with a stage for each power; return the file."""
        config, lines = self.config, [self.file.read_text(encoding="utf-8")]
        steps, count = config.train.steps, len(job.powers)
        for number, power in enumerate(job.powers):
            own = steps * (number + 1) // count - steps * number // count
            # The rate falls in the last stage alone; each stage draws other samples.
            schedule = "cosine" if number == count - 1 else "constant"
            lines += [
                "[[stages]]",
                f'name = "power{number + 1}"',
                f"attention = {{power = {power}.0}}",
            ]
            lines += [f"train = {{steps = {own}, seed = {config.train.seed + number}}}"]
            lines += [f'optim = {{schedule = "{schedule}"}}']
        file = self.folder / f"{job.name}.toml"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(file, "\n".join(lines) + "\n")
        return file


def number_of(words: Sequence[str], key: str) -> int:
    """Return the number that an override gives; `key` ends with "="."""
    return next(int(word.removeprefix(key)) for word in words if word.startswith(key))


def flops(config: Config) -> float:
    """Return the operations of a whole training, from the plan."""
    tokens = config.train.steps * config.train.global_batch_size * config.train.seqlen
    return tokens * make_plan(config, 1).compute.flops_per_token


def run_job(job: Job, place: Place) -> None:
    """Train a job's model and read it; what is finished is skipped.

    Raises:
        ValueError: the training was told to stop.
    """
    folder = place.folder / job.name
    if not is_trained(folder):
        console.rule(f"{job.name}: training", align="left")
        stages = place.stages(job)
        try:
            outcome = run_stages(stages)
        finally:
            end_world()
        if outcome.status != "finished":
            raise ValueError(f"{job.name} was told to stop; run the same command again to continue")
        cost = {"flops": sum(flops(stage.config) for stage in stages)}
        write_file(folder / COSTS, json.dumps(cost) + "\n")
    for read in job.reads:
        if not reading_file(place.folder, read.name).exists():
            console.rule(f"{job.name}: reading {read.name}", align="left")
            _read(job, read, place)


def _read(job: Job, read: Read, place: Place) -> None:
    """Write the file of one reading."""
    config, file = place.config, reading_file(place.folder, read.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    lengths = config.evaluate.lengths
    source = run_folders(place.folder / job.name)[-1]
    parts = ["evaluate.measure=[perplexity,position]", *read.words]
    table = _evaluate(source, parts, file.with_name(f"{read.name}.text.units.jsonl"))
    if read.passkey:
        half = max(lengths) // 2 if read.short_passkey else max(lengths)
        asked = ",".join(str(length) for length in lengths if length <= half)
        parts = [f"evaluate.lengths=[{asked}]", "evaluate.measure=[passkey]", *read.words]
        if read.host_memory:
            parts.append(f"evaluate.device_blocks={2 * number_of(read.words, _TOP_K)}")
        found = _evaluate(source, parts, file.with_name(f"{read.name}.passkey.units.jsonl"))
        table["measured"] |= found["measured"]
    shares = _shares(job, read, lengths)
    if shares:
        table["shares"] = shares
    write_file(file, json.dumps(table, indent=1, allow_nan=False) + "\n")


def _evaluate(source: Path, words: Sequence[str], units: Path) -> dict[str, Any]:
    try:
        with show_progress(TOKENS, progress_console()) as progress:
            return evaluate_checkpoint(source, words, progress, Kept(units))
    finally:
        end_world()


def _shares(job: Job, read: Read, lengths: Sequence[int]) -> dict[str, float]:
    """Return the share of the blocks that a token at the end of each length reads at most."""
    words = (*job.words, *read.words)
    if not any(word.startswith(_TOP_K) for word in words):
        return {}
    read_tokens = number_of(words, _TOP_K) * number_of(words, _BLOCK_SIZE)
    return {str(length): min(1.0, read_tokens / length) for length in lengths}


def run_side_by_side(
    jobs: Sequence[Job], workers: int, words: Sequence[str], place: Place, env: Mapping[str, str]
) -> list[str]:
    """Run jobs in processes of their own, `workers` at a time, each on its share of the cores.

    Args:
        jobs: to run, each behind the one that it starts from.
        workers: processes at a time.
        words: the command without `--only`.
        place: where they run.
        env: environment of the processes.

    Returns:
        The names of the jobs that failed, or that were not run because of one that did.
    """
    waiting, failed, done = list(jobs), list[str](), set[str]()
    running: dict[str, subprocess.Popen[bytes]] = {}
    stopped: list[int] = []
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    wanted = {job.name for job in jobs}
    began: dict[str, float] = {}

    def stop(number: int, _: Any) -> None:
        stopped.append(number)
        for process in running.values():
            process.send_signal(number)

    before = {number: signal.signal(number, stop) for number in FORWARDED}
    try:
        while running or (waiting and not stopped):
            for job in [] if stopped else list(waiting):
                if job.start in failed:
                    waiting.remove(job)
                    failed.append(job.name)
                elif len(running) < workers and (job.start not in wanted or job.start in done):
                    waiting.remove(job)
                    began[job.name] = time.monotonic()
                    running[job.name] = _start(
                        job, words, place, {**env, "OMP_NUM_THREADS": threads}
                    )
            for name, status in _ended(running).items():
                told = f"not finished: see {_log(place, name)}" if status else "done"
                console.print(f"{name}: {told}, {time.monotonic() - began[name]:.0f} s")
                failed += [name] if status else []
                done |= set() if status else {name}
            time.sleep(_POLL_SECONDS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return failed + [job.name for job in waiting]


def _ended(running: dict[str, "subprocess.Popen[bytes]"]) -> dict[str, int]:
    """Remove the processes that have ended; return their exit statuses by job."""
    ended = {name: process.poll() for name, process in running.items()}
    found = {name: status for name, status in ended.items() if status is not None}
    for name in found:
        del running[name]
    return found


def _start(
    job: Job, words: Sequence[str], place: Place, env: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    """Start the process of one job; what it prints goes to its log."""
    log = _log(place, job.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"{job.name}: started; {log}")
    command = [sys.executable, "-m", "lcdist", *words, "--no-tables", "--only", job.name]
    with log.open("ab") as file:
        return subprocess.Popen(command, env=env, stdout=file, stderr=file, process_group=0)


def _log(place: Place, name: str) -> Path:
    return place.folder / "logs" / f"{name}.log"
