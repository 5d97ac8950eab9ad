"""The story of a run with adapters: from a model without, resumed, and what it will not start."""

import os
from pathlib import Path

import pytest

from lcdist.commands.train import run
from tests.distributed import run_ranks
from tests.model.lora_cases import LORA
from tests.model.small import small

SHORT = ("train.steps=2", "optim.warmup_steps=0", "checkpoint.every=1", "model.num_layers=1")


def told(folder: Path, *words: str) -> str:
    """Return how a run in `folder` ends, or what it says instead of starting."""
    config = small(*SHORT, f"log.folder={folder}", *words)
    try:
        outcome = run(config)
    except ValueError as error:
        return str(error)
    return f"{outcome.status} at {outcome.step}"


def story(rank: int, world_size: int, folder: Path) -> dict[str, str]:
    os.environ["WORLD_SIZE"] = str(world_size)
    base, lora = folder / "base", folder / "lora"
    start = (*LORA, f"checkpoint.load={base}")
    return {
        "base": told(base),
        "first": told(lora, *start),
        "on": told(lora, *start, "train.steps=3", "lora.lr_ratio=8"),
        "rank": told(lora, "lora.rank=2", *start[1:], "train.steps=4"),
        "full": told(folder / "full", f"checkpoint.load={lora}"),
        "two": told(folder / "two", *LORA, f"checkpoint.load={lora}", f"lora.load={folder}"),
        "none": told(folder / "none", *start, f"lora.load={folder}"),
        "again": told(folder / "again", *LORA, f"checkpoint.load={lora}"),
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_ranks(story, 1, tmp_path_factory.mktemp("runs"))[0]


@pytest.mark.parametrize(
    ("which", "said"),
    {
        "base": "finished at 2",
        "first": "finished at 2",
        "on": "finished at 3",
        "rank": "holds another run: lora.rank was 3, is 2",
        "full": "other LoRA adapters: lora.rank is 3 there and 0 here",
        "two": "checkpoint.load has adapters already",
        "none": "no adapter_config.json; give PEFT's folder",
        "again": "finished at 2",
    }.items(),
)
def test_a_run_says(answers: dict[str, str], which: str, said: str) -> None:
    assert said in answers[which]
