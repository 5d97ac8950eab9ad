"""Texts of a checkpoint are continued alike on every mesh; what does not fit is refused."""

import os
from functools import partial
from pathlib import Path

import pytest

from lcdist.evaluate import continuation
from lcdist.evaluate.continuation import check_decodes, continue_tokens
from lcdist.evaluate.loaded_model import load_model
from lcdist.inference.settings import Figures, Generation, Watch
from tests.distributed import run_ranks
from tests.evaluate.worlds import trained_model, with_data

PROMPTS = [list(range(3, 3 + n)) for n in (40, 2, 7, 21, 5)]
NEW = 4
LANDMARK = (
    "model.vocab_size=251",
    "attention.method=landmark",
    "attention.block_size=4",
    "attention.top_k=2",
)


def train(rank: int, world_size: int, folder: Path) -> None:
    trained_model(folder, "model.init_std=0.3", *LANDMARK, "attention.select_tokens=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = with_data(tmp_path_factory.mktemp("continuation"))
    run_ranks(partial(train, folder=made), 1)
    return made


def continued(rank: int, world_size: int, folder: Path, mesh: str) -> list[list[int]]:
    os.environ["WORLD_SIZE"] = str(world_size)
    loaded = load_model(folder / "checkpoints", [], [mesh])
    figures: list[Figures] = []
    for slots in (2, 4):
        how = Generation(NEW, device_blocks=slots, piece=8)
        found = continue_tokens(loaded, PROMPTS, how, Watch(on_figures=figures.append))
        assert found == continue_tokens(loaded, PROMPTS, Generation(NEW))
    told = Figures.total(figures)
    assert told.steps > 0 and told.cache_bytes > 0
    assert told.swaps is not None and told.swaps.posted > 0
    assert told.read >= sum(map(len, PROMPTS[loaded.mesh.dp_rank :: loaded.mesh.dp_size]))
    return found


def test_every_mesh_continues_the_prompts_alike(folder: Path) -> None:
    run = partial(continued, folder=folder)
    [alone] = run_ranks(partial(run, mesh="parallel.cp_size=1"), 1)
    assert [len(new) for new in alone] == [NEW] * len(PROMPTS)
    assert len({tuple(new) for new in alone}) == len(PROMPTS)
    for mesh in ("parallel.cp_size=1", "parallel.cp_size=2"):
        assert run_ranks(partial(run, mesh=mesh), 2) == [alone, alone], mesh


def test_batches_fill_the_cache_and_keep_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuation, "CACHED_TOKENS", 50)
    batches = continuation._batches(PROMPTS, NEW)
    assert [[len(prompt) for prompt in batch] for batch in batches] == [[40, 2], [7, 21, 5]]


def refused(rank: int, world_size: int, folder: Path) -> list[str]:
    os.environ["WORLD_SIZE"] = str(world_size)
    messages = []
    for words in ([], ["attention.top_k=4"], ["evaluate.attention=method"]):
        loaded = load_model(folder / "checkpoints", words, [])
        try:
            check_decodes(loaded, Generation(NEW, device_blocks=3))
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_too_few_blocks_on_the_device_are_refused(folder: Path) -> None:
    [[message]] = run_ranks(partial(refused, folder=folder), 1)
    assert "--device-blocks 3" in message and "attention.top_k = 4" in message
    assert "--device-blocks 4 or more" in message
