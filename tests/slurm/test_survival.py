"""slurm/extend_128k.sh on a real cluster: a run resumes exactly after any interruption."""

import json
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.job import (
    STEPS,
    TINY,
    Job,
    last_step,
    losses,
    lost_steps,
    starts,
    submit,
    submit_script,
)

# Every interruption comes after so many steps, and long before the last.
SOME = 10


def assert_finished_as(job: Job, whole: Job, restarts: int) -> None:
    """Assert that the job ended after so many requeues, with every loss equal to the bit."""
    assert job.wait_for_end() == "COMPLETED", job.output
    assert job.restarts == restarts, job.output
    assert losses(job.run) == losses(whole.run)
    assert "all steps are done" in job.output


def assert_nothing_was_done_twice(job: Job) -> None:
    """Assert that each start began at the step where the one before had stopped."""
    begun = starts(job.run)
    assert begun[0] == 0 and all(step >= SOME for step in begun[1:]), job.output
    assert begun == sorted(begun) and lost_steps(job.run) == 0


def test_undisturbed_job_finishes(whole: Job) -> None:
    assert whole.state == "COMPLETED" and whole.restarts == 0, whole.output
    assert [step for step, *_ in losses(whole.run)] == list(range(1, STEPS + 1))
    assert f"step {STEPS}/{STEPS}" in whole.output and "all steps are done" in whole.output
    # Each rank has its own files on each node.
    logs = whole.run / "slurm" / f"{whole.number}.0"
    assert sorted(path.name for path in logs.iterdir()) == ["node1", "node2"]
    assert len(list(logs.rglob("stderr.log"))) == 2


def preempt(cluster: Cluster) -> None:
    """Run a more urgent job on every node for a moment."""
    cluster.call("srun", "--partition=urgent", "--nodes=3", "--exclusive", "true")


@pytest.mark.exhaustive
def test_time_limit_and_preemption_with_grace_lose_no_step(
    free: Cluster, whole: Job, tokens: Path, tmp_path: Path
) -> None:
    # With grace time Slurm signals the ranks and not the batch shell, and treats the job's end as a
    # failure. First, before they have anything to save.
    job = submit(free, tmp_path, tokens, options="--partition=grace")
    job.wait_until(lambda: len(list(job.run.glob("slurm/*.0/node*"))) == 2, "launched")
    preempt(free)
    job.wait_for_steps(SOME)
    assert job.restarts == 1 and starts(job.run) == [0]

    job.signal_batch("USR1")
    job.wait_for_steps(SOME)
    assert job.restarts == 2 and "SIGUSR1" in job.output

    preempt(free)
    assert_finished_as(job, whole, restarts=3)
    assert_nothing_was_done_twice(job)
    assert "SIGTERM" in job.output and f"job {job.number}: SIGTERM" not in job.output
    # Nothing is left that could stop a later start.
    assert not (job.run / "stop").exists() and not (job.run / "STOPPED").exists()


@pytest.mark.exhaustive
def test_job_of_stages_resumes_in_its_stage(free: Cluster, tokens: Path, tmp_path: Path) -> None:
    stages, run = tmp_path / "stages.toml", tmp_path / "run"
    stages.write_text('[[stages]]\nname = "short"\n[[stages]]\nname = "long"\n')
    words = [*TINY, "parallel.cp_size=2", f"data.path={tokens}", f"log.folder={run}"]
    words += ["stages.short.train.steps=5", "stages.long.train.seqlen=512"]
    words = ["slurm/extend_128k.sh", str(stages), *words]
    job = Job(free, tmp_path, submit_script(free, tmp_path, *words))
    job.wait_until(lambda: last_step(run / "2-long") >= SOME, "in the second stage")
    job.signal_batch("USR1")
    assert job.wait_for_end() == "COMPLETED" and job.restarts == 1, job.output
    assert "stage long: told to stop" in job.output and "all steps are done" in job.output
    assert starts(run / "1-short") == [0] and last_step(run / "1-short") == 5
    assert starts(run / "2-long")[0] == 0 and starts(run / "2-long")[1] >= SOME
    assert last_step(run / "2-long") == STEPS and lost_steps(run / "2-long") == 0


@pytest.mark.exhaustive
def test_preemption_without_grace_and_node_failure_resume(
    free: Cluster, whole: Job, tokens: Path, tmp_path: Path
) -> None:
    job = submit(free, tmp_path, tokens, "checkpoint.every=5", options="--partition=abrupt")
    job.wait_for_steps(SOME)
    preempt(free)
    job.wait_for_steps(SOME)
    assert_nothing_was_done_twice(job)
    assert job.restarts == 1 and job.fields()["NodeList"] == "node[1-2]"

    free.kill_node("node2")
    # Slurm would notice by itself, after half a minute.
    free.call("scontrol", "update", "nodename=node2", "state=down", "reason=killed")
    job.wait_until(lambda: job.restarts > 1 and job.state == "RUNNING", "started again")
    assert job.fields()["NodeList"] == "node[1,3]"
    free.start_node("node2")
    assert_finished_as(job, whole, restarts=2)
    assert starts(job.run)[2] >= starts(job.run)[1] + 5


@pytest.mark.exhaustive
def test_cancelled_job_continues_on_one_node(
    free: Cluster, whole: Job, tokens: Path, tmp_path: Path
) -> None:
    words = ["parallel.cp_size=1"]
    job = submit(free, tmp_path, tokens, *words)
    job.wait_for_steps(SOME)
    free.call("scancel", job.number)
    assert job.wait_for_end() == "CANCELLED"
    free.wait_until_idle()
    assert job.state == "CANCELLED" and job.restarts == 0
    stopped = json.loads((job.run / "STOPPED").read_text())
    assert SOME <= stopped["step"] == last_step(job.run) < STEPS
    assert (job.run / "checkpoints" / f"step_{stopped['step']:08d}").is_dir()

    # Two data-parallel ranks become one: the same samples, in the same order.
    smaller = submit(free, tmp_path, tokens, *words, options="--nodes=1")
    assert smaller.wait_for_end() == "COMPLETED", smaller.output
    assert smaller.fields()["NumNodes"] == "1"
    assert_nothing_was_done_twice(smaller)
    found, expected = losses(smaller.run), losses(whole.run)
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[2:] == pytest.approx(theirs[2:], rel=1e-5)


@pytest.mark.exhaustive
def test_chain_of_jobs_finishes_the_run(
    free: Cluster, whole: Job, tokens: Path, tmp_path: Path
) -> None:
    # For clusters that allow no requeue: each job resumes where the one before stopped.
    options = "--job-name=chain --dependency=singleton --no-requeue"
    first, second, third = (submit(free, tmp_path, tokens, options=options) for _ in range(3))
    first.wait_for_steps(SOME)
    assert second.state == third.state == "PENDING"
    first.signal_batch("USR1")
    assert first.wait_for_end() == "COMPLETED", first.output
    assert "allows no requeue" in first.output
    # And one that its owner stops with a file, because the owner cannot reach the ranks.
    second.wait_for_steps(SOME)
    assert third.state == "PENDING"
    (second.run / "stop").touch()
    assert second.wait_for_end() == "COMPLETED", second.output
    assert "stopped by hand" in second.output
    assert_finished_as(third, whole, restarts=0)
    assert_nothing_was_done_twice(third)
    assert len(starts(third.run)) == 3


@pytest.mark.exhaustive
def test_array_of_jobs_finishes_the_run(
    free: Cluster, whole: Job, tokens: Path, tmp_path: Path
) -> None:
    job = submit(free, tmp_path, tokens, options="--array=0-1%1 --no-requeue")
    first, second = Job(free, tmp_path, f"{job.number}_0"), Job(free, tmp_path, f"{job.number}_1")
    first.wait_for_steps(SOME)
    assert second.state == "PENDING"
    first.signal_batch("USR1")
    assert first.wait_for_end() == second.wait_for_end() == "COMPLETED"
    assert losses(job.run) == losses(whole.run)
    assert_nothing_was_done_twice(job)
    assert len(starts(job.run)) == 2
