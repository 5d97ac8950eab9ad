"""Import what DeepSpeed trained elsewhere, bit for bit, and run nothing that its files hold."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from lcdist.convert.deepspeed.zero import LayoutError, split_each, split_together
from lcdist.convert.huggingface.export_model import export_model
from lcdist.convert.huggingface.import_model import import_model
from tests.convert.deepspeed_elsewhere import train_each
from tests.convert.hf import small_pieces
from tests.distributed import run_ranks

# Folder, and the number of its model.
SOURCES = {"zero1": 1, "zero2": 2, "zero3/global_step1": 3, "zero4": 4}
SOURCES |= {"universal1": 1, "universal3": 3}


Trained = tuple[Path, dict[int, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("deepspeed")
    return folder, run_ranks(train_each, 1, folder, timeout=180)[0]


def there_and_back(rank: int, world_size: int, jobs: Sequence[tuple[Path, Path, Path]]) -> Any:
    """Import (Hugging Face folder, DeepSpeed's, out) and export; a function for run_ranks."""
    with small_pieces():
        notes = [import_model(hf, out, deepspeed=theirs).note for hf, theirs, out in jobs]
        for _, _, out in jobs:
            export_model(out, out / "hf")
    return notes


def test_weights_are_those_of_the_trained_model(trained: Trained, tmp_path: Path) -> None:
    check_weights(*trained, tmp_path)


@pytest.mark.exhaustive
def test_weights_of_two_ranks(tmp_path: Path) -> None:
    check_weights(tmp_path, run_ranks(train_each, 2, tmp_path, timeout=180)[0], tmp_path)


def check_weights(folder: Path, weights: dict[int, dict[str, Tensor]], outs: Path) -> None:
    """Import and export everything that was trained, and compare bits."""
    jobs = [
        (folder / f"hf{number}", folder / name, outs / ("ours-" + name.partition("/")[0]))
        for name, number in SOURCES.items()
    ]
    notes = run_ranks(there_and_back, 1, jobs, timeout=180)[0]
    for (_, _, out), number, note in zip(jobs, SOURCES.values(), notes, strict=True):
        found, expected = load_file(out / "hf/model.safetensors"), weights[number]
        assert {*found} == {*expected}
        wrong = [name for name in expected if not torch.equal(found[name].float(), expected[name])]
        assert not wrong, (out.name, wrong)
        assert "not taken over: Adam's moments" in note


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_parameter_is_found_in_the_parts_of_all_ranks(ranks: int) -> None:
    """Cut two groups as stages 1 and 2 do, with gaps, and as stage 3 does."""
    shapes = [{"a": (5, 3), "b": (1,), "c": (7, 2)}, {"d": (4,), "e": (2, 9)}]
    gaps = [[1, 7, 0], [4, 2]]
    whole = {name: torch.randn(shape) for group in shapes for name, shape in group.items()}
    together, each = [[] for _ in range(ranks)], [[] for _ in range(ranks)]
    for group, spaces in zip(shapes, gaps, strict=True):
        padded = [F.pad(whole[n].flatten(), (0, s)) for n, s in zip(group, spaces, strict=True)]
        for rank, part in enumerate(cut_evenly(torch.cat(padded), ranks, 2 * ranks)):
            together[rank].append(part)
        for rank, parts in enumerate(
            zip(*(cut_evenly(whole[name].flatten(), ranks, ranks) for name in group), strict=True)
        ):
            each[rank].append(torch.cat(parts))
    found = (split_together(shapes, together, gaps), split_each(shapes, each))
    for tensors in found:
        assert {*tensors} == {*whole}
        for name, tensor in tensors.items():
            assert torch.equal(tensor.rows(0, len(whole[name])), whole[name])
            half = len(whole[name]) // 2
            assert torch.equal(tensor.rows(half, half + 1), whole[name][half : half + 1])
    with pytest.raises(LayoutError, match="its parameters"):
        split_each(shapes[:1], each)


def cut_evenly(vector: Tensor, ranks: int, multiple: int) -> Sequence[Tensor]:
    return F.pad(vector, (0, -len(vector) % multiple)).chunk(ranks)


class _Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def harm(name: str, **content: Any) -> Callable[[Path], None]:
    """Put an object that runs code into the file `name`."""

    def act(folder: Path) -> None:
        torch.save({**content, "more": _Harmful(folder / "harmed")}, folder / name)

    return act


STATES = "global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt"
WRONG: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "code": ("zero2", harm(STATES), r"_mp_rank_00_optim_states.pt holds posix.mkdir.*zero_to_fp32"),
    "code in a universal one": (
        "universal3",
        harm("zero/lm.weight/fp32.pt", param=torch.ones(1)),
        r"fp32.pt holds posix.mkdir.*ds_to_universal",
    ),
    "rank": (
        "zero2",
        lambda folder: shutil.copy(folder / STATES, folder / STATES.replace("rank_0_", "rank_1_")),
        "has 2 files .*, and 1 ranks wrote it",
    ),
    "first rank": (
        "zero2",
        lambda folder: (folder / STATES).rename(folder / STATES.replace("rank_0_", "rank_1_")),
        "of rank 0 is missing",
    ),
    "truncated": ("zero2", lambda folder: os.truncate(folder / STATES, 99), "truncated or damaged"),
    "model": (
        "zero3",
        lambda folder: (folder / STATES.replace("optim", "model")).unlink(),
        "model_states.pt is missing",
    ),
    "split": (
        "zero2",
        lambda folder: (folder / STATES).rename(folder / STATES.replace("k_00", "k_01")),
        "model that was split",
    ),
    "latest": (
        "zero2",
        lambda folder: (folder / "latest").write_text("../zero3"),
        "latest names '../zero3'",
    ),
    "nothing": ("zero2", lambda folder: (folder / "latest").unlink(), "is no DeepSpeed checkpoint"),
    "universal": (
        "universal3",
        lambda folder: shutil.rmtree(folder / "zero/model.norm.weight"),
        "model.norm.weight is missing",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_read_is_refused(case: str, trained: Trained, tmp_path: Path) -> None:
    name, change, message = WRONG[case]
    theirs = Path(shutil.copytree(trained[0] / name, tmp_path / name))
    if case.startswith("code in"):
        (theirs / "zero/lm.weight").mkdir()
    change(theirs)
    with pytest.raises(ValueError, match=message):
        import_model(trained[0] / f"hf{name[-1]}", tmp_path / "out", deepspeed=theirs)
    assert not (theirs / "harmed").exists() and not (tmp_path / "out").exists()
