"""One cluster for all tests of this folder, or the reason why there is none."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from lcdist.commands.main import main
from tests.slurm.cluster import Cluster, what_is_missing
from tests.slurm.job import Job, submit

HERE = Path(__file__).parent
NODES = 3


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker by which these tests can be selected."""
    config.addinivalue_line("markers", "slurm: needs Slurm's packages and root")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("slurm")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start three nodes; skip if they cannot be made."""
    missing = what_is_missing()
    if missing:
        pytest.skip(f"no Slurm cluster: {missing}")
    with Cluster(tmp_path_factory.mktemp("cluster") / "slurm", NODES) as made:
        yield made


@pytest.fixture
def free(cluster: Cluster) -> Iterator[Cluster]:
    """Return the cluster, without jobs before and after the test."""
    yield cluster
    cluster.call("scancel", "--user=root")
    cluster.wait_until_idle()


@pytest.fixture(scope="session")
def tokens(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenize a little text with something to learn."""
    text, words = tmp_path_factory.mktemp("text"), random.Random(0)
    names = ["".join(words.choices("abcdefghij", k=5)) for _ in range(50)]
    for number in range(8):
        lines = [f"{name} = {words.choice(names)}" for name in words.choices(names, k=400)]
        (text / f"part{number}.txt").write_text("\n".join(lines))
    sizes = ["--vocab-size", "320", "--valid-fraction", "0.2"]
    assert main(["tokenize", str(text), str(text / "tokens"), *sizes]) == 0
    return text / "tokens"


@pytest.fixture(scope="session")
def whole(cluster: Cluster, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Run one job without interruptions to its end."""
    job = submit(cluster, tmp_path_factory.mktemp("whole"), tokens)
    job.wait_for_end()
    return job
