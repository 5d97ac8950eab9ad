"""The batch scripts: Slurm and a linter accept them; a mistake is reported and not requeued."""

import json
import re
import signal
import socket
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.job import Job, losses, starts, submit, submit_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
SHELL = [*SCRIPTS, *sorted((ROOT / "launch").glob("*.sh")), ROOT / "tests/slurm/install.sh"]


def named(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("script", SHELL, ids=named)
def test_script_passes_bash_and_shellcheck(script: Path, cluster: Cluster) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    words = ["shellcheck", "--external-sources", "--source-path=.", str(script.relative_to(ROOT))]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_script_is_accepted_by_sbatch(script: Path, cluster: Cluster) -> None:
    cluster.call("sbatch", "--test-only", str(script))


@pytest.mark.parametrize("script", SHELL, ids=named)
def test_script_names_existing_configurations(script: Path) -> None:
    for name in re.findall(r"configs/[\w/.-]+\.toml", script.read_text(encoding="utf-8")):
        assert (ROOT / name).exists()


def test_local_launcher_prints_usage() -> None:
    words = [str(ROOT / "launch" / "local.sh"), "configs/debug/full.toml"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "launch/local.sh N CONFIG" in done.stderr


def function_of_job(name: str) -> str:
    """Return a function of job.sh as text."""
    text = (ROOT / "slurm" / "job.sh").read_text(encoding="utf-8")
    found = re.search(rf"^{name}\(\) \{{.*?^\}}", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[0]


@pytest.mark.parametrize(
    ("status", "has_begun", "answers"),
    [
        # A mistake: another start would end in the same way.
        ("1", False, ["gave up"]),
        ("2", False, ["gave up"]),
        ("1", True, ["requeued", "requeued", "failed 3 times"]),
        # A launcher was killed while the job was starting.
        ("143", False, ["requeued", "requeued", "failed 3 times"]),
        ("137", False, ["requeued", "requeued", "failed 3 times"]),
    ],
)
def test_a_failed_start_is_requeued_if_it_was_no_mistake(
    status: str, has_begun: bool, answers: list[str], tmp_path: Path
) -> None:
    (tmp_path / "slurm").mkdir()
    script = f"""
    LCDIST_MAX_FAILURES=2 LCDIST_RANK_LOGS= SLURM_JOB_ID=1 run={tmp_path} term= usr1=
    say() {{ echo "$@"; }}
    preempted() {{ false; }}
    give_up() {{ echo gave up; exit 1; }}
    requeue() {{ echo requeued; exit 0; }}
    starts() {{ echo {"after" if has_begun else "before"}; }}
    newest_checkpoint() {{ :; }}
    {function_of_job("conclude")}
    conclude {status} before
    """
    for answer in answers:
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert answer in done.stdout.splitlines()[-1], done.stdout + done.stderr


def test_free_port_skips_ports_in_use_and_fails_without_any() -> None:
    free_port = function_of_job("free_port")
    script = f'refuse() {{ echo "$*" >&2; exit 2; }}\nSLURM_JOB_ID=177\n{free_port}\nfree_port'
    with ExitStack() as listening:

        def take(port: int) -> None:
            # Any port with a listener will do.
            with suppress(OSError):
                listening.enter_context(socket.create_server(("127.0.0.1", port)))

        take(27700)
        chosen = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert 27701 <= int(chosen.stdout) < 27800
        for port in range(27701, 27800):
            take(port)
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no free port from 27700 to 27799" in done.stderr and "set LCDIST_PORT" in done.stderr


def test_misspelt_key_ends_the_job_before_training(
    free: Cluster, tokens: Path, tmp_path: Path
) -> None:
    job = submit(free, tmp_path, tokens, "train.step=5")
    assert job.wait_for_end() == "FAILED" and job.restarts == 0
    assert "unknown key 'train.step'; did you mean 'train.steps'?" in job.output
    assert "Traceback" not in job.output and not job.run.exists()


@pytest.mark.exhaustive
def test_dying_rank_requeues_up_to_the_limit(free: Cluster, tokens: Path, tmp_path: Path) -> None:
    # Nothing is saved in between: the second failure in a row is one too many.
    job = submit(free, tmp_path, tokens, LCDIST_MAX_FAILURES="1")
    for number in (0, 1):
        job.wait_until(lambda: len(starts(job.run)) > number, "training")  # noqa: B023
        free.rank_of(job.run, 1).kill()
    assert job.wait_for_end() == "FAILED" and job.restarts == 1, job.output
    assert "failed 2 times since the start: not requeued" in job.output
    assert starts(job.run) == [0, 0]


@pytest.mark.exhaustive
def test_frozen_rank_is_named_and_requeues_up_to_the_limit(
    free: Cluster, tokens: Path, tmp_path: Path
) -> None:
    words = ["parallel.stall=3", "train.steps=100000"]
    variables = {"LCDIST_MAX_FAILURES": "1", "LCDIST_PROCS_PER_NODE": "2"}
    job = submit(free, tmp_path, tokens, *words, options="--nodes=1", **variables)
    for number in (0, 1):
        job.wait_until(lambda: len(starts(job.run)) > number, "training")  # noqa: B023
        job.wait_for_steps(3)
        free.rank_of(job.run, 1).send_signal(signal.SIGSTOP)
        # The rank must be named in rank 0's output within the watchdog's limit: the launcher's own
        # limit for ranks that do not react is ten minutes.
        job.wait_until(lambda: job.output.count("sends no heartbeat") > number, "named")  # noqa: B023
    assert job.wait_for_end() == "FAILED" and job.restarts == 1, job.output
    assert "missing: rank 1 sends no heartbeat" in job.output
    # The other rank may wait in attention or in the step's all-reduce.
    assert "(attention: full)" in job.output and "waiting: rank 0 in " in job.output, job.output
    assert "failed 2 times since the start: not requeued" in job.output


@pytest.mark.exhaustive
def test_evaluate_script_writes_evaluation_json(free: Cluster, whole: Job, tmp_path: Path) -> None:
    words = ["--nodes=2", "slurm/evaluate.sh", str(whole.run), "evaluate.lengths=[64,256]"]
    job = Job(free, tmp_path, submit_script(free, tmp_path, *words, "evaluate.tokens=2048"))
    assert job.wait_for_end() == "COMPLETED", job.output
    result = json.loads((whole.run / "evaluation.json").read_text())
    assert result["lengths"] == [64, 256] and None not in result["perplexity"]


@pytest.mark.exhaustive
def test_smoke_script_measures_traffic_and_bandwidth(free: Cluster, tmp_path: Path) -> None:
    words = ["slurm/smoke.sh", f"log.folder={tmp_path}/run", "log.peak_tflops=1"]
    job = Job(free, tmp_path, submit_script(free, tmp_path, *words))
    assert job.wait_for_end() == "COMPLETED", job.output
    assert len(losses(job.run)) == 10
    sent = re.search(r"measured ([\d,]+), planned ([\d,]+)", job.output)
    assert sent and sent[1] == sent[2] != "0", job.output
    assert len(re.findall(r"2 ranks, gloo: \d+\.\d\d GB/s", job.output)) == 2
