"""Loss by position and LongPPL: the losses of plain forward passes, on every mesh."""

import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist.evaluate.evaluation import Kept, evaluate_checkpoint
from lcdist.model.build import CausalLM
from tests.distributed import run_ranks
from tests.evaluate.worlds import document, plain_losses, trained_model, with_data, write_tokens

LENGTH, BINS, SHORT, STEP = 96, 7, 30, 20
# The losses of a model that has learned little are near 5.5 and hardly depend on the context.
GAIN, LOSS = 0.02, 5.6
ASKED = [
    *(f"evaluate.lengths=[24, {LENGTH}]", f"evaluate.tokens={3 * LENGTH}", f"evaluate.bins={BINS}"),
    *(f"evaluate.short_context={SHORT}", f"evaluate.short_step={STEP}"),
    *(f"evaluate.key_gain={GAIN}", f"evaluate.key_loss={LOSS}"),
    "evaluate.measure=[position, longppl]",
]
SPREAD = "model.init_std=0.2"


def key_tokens(model: CausalLM, text: Tensor, long: Tensor) -> list[int]:
    """Find the key tokens of a text as the paper's code does; the margins are clear."""
    found = []
    for start in range(0, len(text) - SHORT, STEP):
        group = text[start : start + SHORT + STEP]
        short = plain_losses(model, group)[SHORT - 1 :]
        for i, loss in enumerate(short.tolist(), start + SHORT - 1):
            margins = loss - long[i].item() - GAIN, LOSS - long[i].item()
            assert all(abs(margin) > 2e-5 for margin in margins)
            if all(margin > 0 for margin in margins):
                found.append(i)
    return found


def reference(
    rank: int, world_size: int, folder: Path, *words: str
) -> tuple[list[Any], dict[str, list[list[float]]]]:
    """Train two models; return the first one's loss by bin, and losses of key tokens by marker."""
    models = {}
    for name, layers in (("one", 4), ("two", 2)):
        models[name] = trained_model(folder, SPREAD, f"model.num_layers={layers}", *words)
        (folder / "checkpoints").rename(folder / name)
    text, longs = document(folder), {}
    bins, keys = [], {name: list[list[float]]() for name in models}
    for start in range(0, 3 * LENGTH, LENGTH):
        window = text[start : start + LENGTH + 1]
        longs = {name: plain_losses(model, window) for name, model in models.items()}
        borders = [round(LENGTH * i / BINS) for i in range(BINS + 1)]
        bins.append([longs["one"][a:b].mean().item() for a, b in pairwise(borders)])
        for name, model in models.items():
            places = key_tokens(model, window[:-1], longs[name])
            keys[name].append(longs["one"][places].tolist())
    return bins, keys


def evaluated(
    rank: int, world_size: int, folder: Path, meshes: list[list[str]]
) -> list[dict[str, Any]]:
    os.environ["WORLD_SIZE"] = str(world_size)
    return [evaluate_checkpoint(folder / "one", [*ASKED, *mesh])["measured"] for mesh in meshes]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = with_data(tmp_path_factory.mktemp("parts"))
    return folder, run_ranks(reference, 1, folder)[0]


def assert_as_expected(measured: dict[str, Any], expected: Any, marker: str = "one") -> None:
    bins, keys = expected
    position, longppl = measured["position"], measured["longppl"]
    means = [sum(each) / len(each) for each in zip(*bins, strict=True)]
    assert position["loss"] == pytest.approx(means, rel=1e-5)
    assert (position["first"][0], position["last"][-1], position["windows"]) == (1, LENGTH, 3)
    assert all(a == b + 1 for a, b in zip(position["first"][1:], position["last"], strict=False))
    assert sum(position["scored"]) == 3 * LENGTH
    for (low, high), mean, of_bin in zip(
        position["interval"], means, zip(*bins, strict=True), strict=True
    ):
        half = 4.30265 * torch.tensor(of_bin, dtype=torch.float64).std().item() / math.sqrt(3)
        assert (low, high) == pytest.approx((mean - half, mean + half), rel=1e-4)
    losses = [loss for window in keys[marker] for loss in window]
    assert longppl["key_tokens"] == len(losses) > 10
    assert longppl["longppl"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert longppl["in_reach"] == 3 * (LENGTH - SHORT) and not longppl["not_finite"]
    assert longppl["interval"][0] < longppl["longppl"] < longppl["interval"][1]
    assert longppl["scored"] == 3 * (LENGTH - 1)


def test_equal_plain_passes_on_one_rank_and_on_two(world: Any) -> None:
    folder, expected = world
    meshes = [
        [],
        ["parallel.layout=striped"],
        ["parallel.cp_size=1"],
        ["parallel.cp_size=1", "parallel.pp_size=2"],
        ["parallel.cp_size=1", "parallel.tp_size=2", "parallel.sequence_parallel=true"],
    ]
    for [measured] in run_ranks(evaluated, 1, folder, [[]]):
        assert_as_expected(measured, expected)
    for of_rank in run_ranks(evaluated, 2, folder, meshes):
        for measured in of_rank:
            assert_as_expected(measured, expected)


@pytest.mark.exhaustive
def test_equal_plain_passes_on_four_ranks(world: Any) -> None:
    folder, expected = world
    meshes = [
        [],
        ["parallel.cp_size=2"],
        ["parallel.cp_size=2", "parallel.tp_size=2"],
        ["parallel.cp_size=2", "parallel.pp_size=2"],
        ["parallel.cp_size=1"],
    ]
    results = run_ranks(evaluated, 4, folder, meshes)
    for of_rank in results:
        assert of_rank == results[0]
        for measured in of_rank:
            assert_as_expected(measured, expected)


@pytest.mark.parametrize(
    "words",
    [
        ("attention.method=landmark", "attention.block_size=5", "model.vocab_size=251"),
        pytest.param(
            ("attention.method=tensorized", "attention.modes=[4]"), marks=pytest.mark.exhaustive
        ),
    ],
    ids=lambda words: words[0],
)
def test_text_laid_out_in_blocks_keeps_its_positions(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    folder = with_data(tmp_path)
    expected = run_ranks(reference, 1, folder, *words)[0]
    for ranks in (1, 2):
        for [measured] in run_ranks(evaluated, ranks, folder, [[]]):
            assert_as_expected(measured, expected)


def marked(rank: int, world_size: int, folder: Path, file: Path) -> list[dict[str, Any]]:
    """Evaluate with markers: itself, another one, and the other one again from its file."""
    os.environ["WORLD_SIZE"] = str(world_size)
    words = [[*ASKED, f"evaluate.marker={folder / name}"] for name in ("one", "two", "two")]
    found = [evaluate_checkpoint(folder / "one", words[0])["measured"]]
    for each in words[1:]:
        # What is set for the evaluated model is not for the marker.
        more = ["model.num_layers=4"]
        found.append(
            evaluate_checkpoint(folder / "one", [*each, *more], kept=Kept(file))["measured"]
        )
    return found


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_another_checkpoint_marks(world: Any, tmp_path: Path, ranks: int) -> None:
    folder, expected = world
    for own, other, again in run_ranks(marked, ranks, folder, tmp_path / "x.units.jsonl"):
        assert_as_expected(own, expected)
        assert_as_expected(other, expected, marker="two")
        assert again == other
        assert own["longppl"]["key_tokens"] != other["longppl"]["key_tokens"]


def refused(rank: int, world_size: int, folder: Path, words: list[list[str]]) -> list[str]:
    found = []
    for each in words:
        with pytest.raises(ValueError) as caught:
            evaluate_checkpoint(folder / "one", [*ASKED, *each])
        found.append(str(caught.value))
    return found


def test_what_does_not_fit_is_refused(world: Any, tmp_path: Path) -> None:
    folder, _ = world
    write_tokens(tmp_path / "other", {"valid": [list(range(1, 200)) * 3]}, fingerprint="other")
    words = [
        ["evaluate.short_context=96"],
        ["evaluate.marker=nowhere"],
        [f"evaluate.marker={folder / 'two'}", f"data.path={tmp_path / 'other'}"],
    ]
    [[short, nowhere, tokenizer]] = run_ranks(refused, 1, folder, words)
    assert short == (
        "evaluate.short_context = 96: must be less than the longest of evaluate.lengths, 96; lower "
        "it, or add a longer length"
    )
    assert nowhere.startswith("evaluate.marker: checkpoint 'nowhere': does not exist")
    assert "has another tokenizer than the text in" in tokenizer
