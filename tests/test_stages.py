"""Stages: one file gives several configurations, which are trained one after another."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lcdist.commands.stages import run_stages
from lcdist.commands.train import run
from lcdist.config import ConfigError
from lcdist.config.rope import RopePI, RopeYarn
from lcdist.config.stages import load_stages
from lcdist.rundir.records import read_records
from tests.checkpoint.stored import assert_same_tensors
from tests.distributed import run_ranks
from tests.train.test_resume import launched
from tests.train.test_survival import asked_at

BASE = """
[model]
vocab_size = 250
num_layers = 2
hidden_size = 32
nheads = 2
ffn_hidden_size = 64
[model.rope]
scaling = "pi"
factor = 2.0
[train]
seqlen = 32
steps = 4
global_batch_size = 4
[data]
source = "synthetic"
[log]
folder = "FOLDER"
tensorboard = false
peak_tflops = 1.0
"""
STAGES = """
[[stages]]
name = "short"
[[stages]]
name = "long"
train = {seqlen = 64, steps = 9, global_batch_size = 2}
model.rope = {factor = 4.0}
parallel = {cp_size = 2}
"""


def written(folder: Path, text: str = BASE + STAGES) -> Path:
    file = folder / "stages.toml"
    file.write_text(text.replace("FOLDER", str(folder / "run")))
    return file


def test_stage_overrides_its_keys_and_starts_from_the_previous_one(tmp_path: Path) -> None:
    short, long = load_stages(written(tmp_path))
    home = str(tmp_path / "run")
    assert (short.name, long.name) == ("short", "long")
    assert (short.config.log.folder, long.config.log.folder) == (
        f"{home}/1-short",
        f"{home}/2-long",
    )
    assert (short.config.checkpoint.load, long.config.checkpoint.load) == ("", f"{home}/1-short")
    assert (short.config.train.seqlen, long.config.train.seqlen) == (32, 64)
    assert (short.config.train.steps, long.config.train.steps) == (4, 9)
    assert short.config.model.rope == RopePI(factor=2.0)
    assert long.config.model.rope == RopePI(factor=4.0)
    assert long.config.model.num_layers == 2 and long.config.parallel.cp_size == 2


def test_file_without_stages_is_one_stage(tmp_path: Path) -> None:
    [only] = load_stages(written(tmp_path, BASE), ["train.steps=9"])
    assert only.name == "" and only.config.train.steps == 9
    assert only.config.log.folder == str(tmp_path / "run")


def test_override_applies_to_all_stages_or_to_the_named_one(tmp_path: Path) -> None:
    words = ["train.steps=9", "stages.long.train.seqlen=96", "checkpoint.load=elsewhere"]
    short, long = load_stages(written(tmp_path), words)
    assert (short.config.train.steps, long.config.train.steps) == (9, 9)
    assert (short.config.train.seqlen, long.config.train.seqlen) == (32, 96)
    assert short.config.checkpoint.load == "elsewhere"
    assert long.config.checkpoint.load == short.config.log.folder


def test_adapters_are_loaded_by_the_first_stage_only(tmp_path: Path) -> None:
    words = ["lora.rank=4", "lora.load=adapter"]
    short, long = load_stages(written(tmp_path), words)
    assert (short.config.lora.load, long.config.lora.load) == ("adapter", "")
    assert long.config.lora.rank == 4


def test_table_with_another_tag_replaces_the_whole_table(tmp_path: Path) -> None:
    yarn = '[[stages]]\nname="x"\nmodel.rope = {scaling="yarn", original_seqlen=16}\n'
    [stage] = load_stages(written(tmp_path, BASE + yarn))
    assert stage.config.model.rope == RopeYarn(original_seqlen=16)


@pytest.mark.parametrize(
    ("stages", "words", "expected"),
    [
        (
            'stages = "x"\n' + BASE,
            [],
            "stages = 'x': expected tables, each written below [[stages]]",
        ),
        (
            BASE + "[[stages]]\n",
            [],
            "stages[0].name = None: expected letters, digits, '.', '_' and '-', different for "
            "each stage",
        ),
        (
            BASE + '[[stages]]\nname="a/b"\n',
            [],
            "stages[0].name = 'a/b': expected letters, digits, '.', '_' and '-', different for "
            "each stage",
        ),
        (
            BASE + '[[stages]]\nname="a"\ntrain.sequlen=3\n[[stages]]\nname="b"\n',
            [],
            "stage 'a': unknown key 'train.sequlen'; did you mean 'train.seqlen'?",
        ),
        (
            BASE + '[[stages]]\nname="a"\nlog.folder="x"\n',
            [],
            "stage 'a': log.folder follows from the stage's number; set it outside [[stages]]",
        ),
        (
            BASE + STAGES,
            ["stages.longer.train.steps=3"],
            "override 'stages.longer.train.steps=3': the stages are short, long",
        ),
        (
            BASE + STAGES,
            ["stages.long.train.stepps=3"],
            "stage 'long': unknown key 'train.stepps'; did you mean 'train.steps'?",
        ),
        (BASE, ["stages.long.train.steps=3"], "override 'stages.long.train.steps=3': "),
    ],
)
def test_mistake_names_its_stage(
    tmp_path: Path, stages: str, words: list[str], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_stages(written(tmp_path, stages), words)
    [line] = caught.value.errors
    assert line.startswith(expected)


NAMES = ("whole", "stopped", "separate")


def train(rank: int, world_size: int, folder: Path) -> list[Any]:
    launched(world_size)
    [whole, stopped, separate] = [load_stages(folder / name / "stages.toml") for name in NAMES]
    results: list[Any] = [run_stages(whole)]
    home = folder / "stopped" / "run"
    with asked_at(5, home / "stop"):
        results.append(run_stages(stopped))
    signals = sorted(path.name for path in home.iterdir())
    results += [signals, json.loads((home / "STOPPED").read_text())]
    # The next start removes the signal files, which the other rank may not have read yet.
    dist.barrier()
    results.append(run_stages(stopped))
    results += [run_stages(stopped), sorted(path.name for path in home.iterdir())]
    for stage in separate:
        run(stage.config)
    return results


def curve(folder: Path) -> list[tuple[float, ...]]:
    records = read_records(folder / "metrics.jsonl")
    return [(r.step, r.samples, r.tokens, r.loss, r.grad_norm, r.lr) for r in records]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("stages")
    for name in NAMES:
        (folder / name).mkdir()
        written(folder / name)
    return folder, run_ranks(train, 2, folder)[0]


def test_stages_are_runs_one_after_another(trained: Any) -> None:
    folder, (whole, *_) = trained
    assert (whole.status, whole.step) == ("finished", 9)
    assert whole.reason == "all 2 stages are done"
    for stage, steps in (("1-short", 4), ("2-long", 9)):
        found, expected = (folder / name / "run" / stage for name in ("whole", "separate"))
        assert curve(found) == curve(expected) and len(curve(found)) == steps
    last = "run/2-long/checkpoints/step_00000009"
    assert_same_tensors(folder / "whole" / last, folder / "separate" / last)


def test_stopped_stage_continues(trained: Any) -> None:
    folder, (_, stopped, signals, signal, finished, again, remaining) = trained
    assert stopped.status == "stopped" and stopped.step in (5, 6)
    assert stopped.reason == "stage long: told to stop (the file stop)"
    assert signals == ["1-short", "2-long", "STOPPED"]
    assert signal["step"] == stopped.step
    assert Path(signal["checkpoint"]).parts[-3:-1] == ("2-long", "checkpoints")
    assert (finished.status, again.status, again.step) == ("finished", "finished", 9)
    assert remaining == ["1-short", "2-long", "DONE"]
    for stage in ("1-short", "2-long"):
        found, expected = (folder / name / "run" / stage for name in ("stopped", "whole"))
        assert curve(found) == curve(expected)


def plan_error(rank: int, world_size: int, folder: Path) -> str:
    launched(world_size)
    stages = load_stages(folder / "stages.toml", ["stages.long.parallel.cp_size=3"])
    with pytest.raises(ConfigError) as caught:
        run_stages(stages)
    return str(caught.value)


def test_mistake_in_a_later_stage_is_reported_before_the_first_runs(tmp_path: Path) -> None:
    written(tmp_path)
    [message, _] = run_ranks(plan_error, 2, tmp_path)
    assert message.startswith("stage 'long': ") and "cp_size" in message
    assert not (tmp_path / "run").exists()
