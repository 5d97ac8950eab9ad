"""A job of the test cluster: submitted with the project's own script, watched, interrupted."""

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.slurm.cluster import Cluster

# Far more than needed: a start takes ten seconds on two idle cores, which may be shared.
SECONDS = 300.0
STEPS = 100
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
# The script's configuration, small enough for a CPU. It saves when told to stop and at
# the end.
TINY = (
    "model.vocab_size=320 model.num_layers=1 model.hidden_size=32 model.nheads=2 "
    "model.ffn_hidden_size=64 parallel.tp_size=1 parallel.sequence_parallel=false "
    f"parallel.timeout=60 train.seqlen=256 train.steps={STEPS} train.global_batch_size=2 "
    "train.dtype=fp32 train.recompute=none optim.lr=1e-3 optim.warmup_steps=4 "
    "checkpoint.load= checkpoint.every=0 log.tensorboard=false log.peak_tflops=1"
).split()
# The environment of the tests' jobs: one rank a node, and none of the machine's settings.
ENVIRONMENT = {"LCDIST_PROCS_PER_NODE": "1", "LCDIST_SITE": "/dev/null"}


class Job:
    """One job; its run is `folder`/run, and its output is beside it."""

    def __init__(self, cluster: Cluster, folder: Path, number: str) -> None:
        self.cluster, self.folder, self.number = cluster, folder, number
        self.run = folder / "run"
        self._hurried = 0

    def fields(self) -> dict[str, str]:
        """Return the fields that Slurm reports for the job."""
        shown = self.cluster.call("scontrol", "show", "job", "-o", self.number)
        return dict(word.partition("=")[::2] for word in shown.split())

    @property
    def state(self) -> str:
        """Return Slurm's state of the job."""
        return self.fields()["JobState"]

    @property
    def restarts(self) -> int:
        """Return how often it was requeued and started again."""
        return int(self.fields()["Restarts"])

    @property
    def output(self) -> str:
        """Return its output of all starts."""
        return "".join(file.read_text() for file in self.folder.glob(f"*-{self.number}.out"))

    def signal_batch(self, name: str) -> None:
        """Send a signal to the batch shell only, as Slurm does before the time limit."""
        self.cluster.call("scancel", "--batch", f"--signal={name}", self.number)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Sleep until the condition holds; fail if the job ends first."""
        self._wait(condition, what, others_than=())

    def wait_for_steps(self, more: int) -> None:
        """Wait until the run has taken `more` steps beyond the present ones."""
        begun = last_step(self.run)
        self.wait_until(lambda: last_step(self.run) >= begun + more, f"{more} steps further")

    def wait_for_end(self) -> str:
        """Wait until the job is over, and return Slurm's final state."""
        self._wait(lambda: False, "over", others_than=ENDED)
        return self.state

    def _hurry(self, fields: dict[str, str]) -> None:
        """Renew a requeued job's credentials, so that Slurm does not hold it until they expire.

        Never in the second in which the old credentials were revoked: the new ones would count as
        revoked too.
        """
        if fields["Reason"] == "BeginTime" and int(fields["Restarts"]) > self._hurried:
            self._hurried = int(fields["Restarts"])
            number = f"jobid={self.number}"
            self.cluster.call("scontrol", "update", number, "starttime=now+2seconds")

    def _wait(self, condition: Callable[[], bool], what: str, others_than: Sequence[str]) -> None:
        now = time.monotonic()
        deadline, look = now + SECONDS, now
        while not condition():
            time.sleep(0.05)
            now = time.monotonic()
            # Seldom: every question takes CPU time from the job.
            if now < look:
                continue
            look, fields = now + 0.5, self.fields()
            if fields["JobState"] in others_than:
                return
            if fields["JobState"] in ENDED and not condition() or now > deadline:
                raise AssertionError(f"never {what}: {fields}\n{self.output}")
            self._hurry(fields)


def submit(
    cluster: Cluster,
    folder: Path,
    tokens: Path,
    *words: str,
    options: str = "",
    **variables: str,
) -> Job:
    """Submit slurm/extend_128k.sh on two nodes with a tiny model, on CPUs, with gloo.

    words: overrides. options: of sbatch. variables: of the environment.
    """
    shared = ["parallel.cp_size=2", f"data.path={tokens}", f"log.folder={folder}/run"]
    script = ["slurm/extend_128k.sh", *TINY, *shared, *words]
    number = submit_script(cluster, folder, *options.split(), *script, **variables)
    return Job(cluster, folder, number)


def submit_script(cluster: Cluster, folder: Path, *words: str, **variables: str) -> str:
    """Submit a script with `sbatch` and return the job's number; its output goes to `folder`."""
    output = f"--output={folder}/%x-%j.out"
    printed = cluster.call("sbatch", output, *words, **(ENVIRONMENT | variables))
    number = re.fullmatch(r"Submitted batch job (\d+)\n", printed)
    assert number, printed
    return number[1]


def losses(run: Path) -> list[tuple[int, int, float, float]]:
    """Return (step, samples so far, loss, gradient norm) of every step in a run's metrics."""
    file = run / "metrics.jsonl"
    # A line that is being written has no end yet.
    lines = file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
    keys = ("step", "samples", "loss", "grad_norm")
    return [tuple(json.loads(line)[key] for key in keys) for line in lines]


def last_step(run: Path) -> int:
    """Return the last step in a run's metrics; 0 before the first."""
    return max((step for step, *_ in losses(run)), default=0)


def starts(run: Path) -> list[int]:
    """Return the steps at which a run was started."""
    return [start["step"] for start in _noted_starts(run)]


def lost_steps(run: Path) -> int:
    """Return the steps that were taken and not saved, over all starts."""
    return sum(start["lost_steps"] for start in _noted_starts(run))


def _noted_starts(run: Path) -> list[dict[str, int]]:
    file = run / "run.json"
    return json.loads(file.read_text())["starts"] if file.exists() else []
