"""Settings of the model that come from the checkpoint a run starts from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lcdist.config import ConfigError, dump
from lcdist.config.overrides import merge_overrides
from lcdist.config.rope import (
    Rope,
    RopeLlama3,
    RopeLong,
    RopeNTK,
    RopePI,
    RopePlain,
    RopeYarn,
)
from lcdist.config.rope_extend import extend_rope
from lcdist.config.schema import Config, ModelConfig
from lcdist.config.source import Source
from lcdist.config.stages import load_stages

SMOL = ModelConfig(
    vocab_size=250,
    num_layers=2,
    hidden_size=64,
    nheads=4,
    nheads_kv=2,
    ffn_hidden_size=96,
    norm_eps=1e-6,
    tied_embeddings=True,
    rope=RopePlain(base=1e5),
)
REST = """
[train]
seqlen = 256
steps = 2
[log]
folder = "runs/new"
"""
LONG = RopeLong(original_seqlen=64, short_factors=(1.0,) * 8, long_factors=(2.0,) * 8)


def finder(model: ModelConfig = SMOL, known: str = "models/smol", is_own: bool = False) -> Any:
    def find(folder: str, run_folder: str) -> Source | None:
        assert run_folder in ("runs/new", "runs/new/1-short")
        return Source(folder, model, 64, is_own) if folder == known else None

    return find


def load(tmp_path: Path, text: str, *words: str, model: ModelConfig = SMOL, **more: Any) -> Config:
    file = tmp_path / "run.toml"
    file.write_text(text + REST, encoding="utf-8")
    [stage] = load_stages(file, words, finder(model, **more))
    return stage.config


def mistakes(tmp_path: Path, text: str, *words: str, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *words, **more)
    return str(caught.value)


@pytest.mark.parametrize(
    "text", ['[model]\nfrom = "models/smol"', '[checkpoint]\nload = "models/smol"']
)
def test_an_empty_model_is_the_sources(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, text)
    assert config.model == SMOL and config.checkpoint.load == "models/smol"
    # What is written into the run's folder needs the source no more.
    assert load_stages(_written(tmp_path, dump(config)))[0].config == config


def _written(folder: Path, text: str) -> Path:
    file = folder / "config.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_weights_of_the_source_can_be_left_out(tmp_path: Path) -> None:
    config = load(tmp_path, '[checkpoint]\nload = ""\n[model]\nfrom = "models/smol"')
    assert config.model == SMOL and config.checkpoint.load == ""


FILLED = """
[checkpoint]
load = "models/smol"
[model]
vocab_size = 250
num_layers = 2
hidden_size = 64
nheads = 4
nheads_kv = 2
ffn_hidden_size = 96
"""


def test_a_default_never_counts_as_written(tmp_path: Path) -> None:
    assert load(tmp_path, FILLED).model == SMOL
    pi = load(tmp_path, FILLED + '[model.rope]\nscaling = "pi"\nfactor = 4.0').model
    assert pi == replace(SMOL, rope=RopePI(base=1e5, factor=4.0))
    yarn = load(tmp_path, FILLED + '[model.rope]\nscaling = "yarn"\nfactor = 4.0').model
    assert yarn.rope == RopeYarn(base=1e5, factor=4.0, original_seqlen=64)


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("model.rope.base=10000.0", ("10000.0", "100000.0", "extend = 'base:10000'")),
        ("model.norm_eps=1e-5", ("1e-05", "1e-06")),
        ("model.tied_embeddings=false", ("False", "True")),
        ("model.qkv_bias=true", ("True", "False")),
        ("model.nheads_kv=4", ("4", "2")),
    ],
)
def test_a_written_key_that_differs_is_refused(
    tmp_path: Path, word: str, named: tuple[str, ...]
) -> None:
    message = mistakes(tmp_path, FILLED, word)
    key = word.partition("=")[0]
    assert message.startswith(f"{key} = {named[0]}: models/smol has {named[1]}; leave the key out")
    assert all(part in message for part in named)


def test_mistakes_are_told_together(tmp_path: Path) -> None:
    message = mistakes(tmp_path, FILLED, "model.norm_eps=1e-5", "train.stpes=3", "optim.lr='x'")
    assert [line.split(" ")[0] for line in message.splitlines()] == [
        "model.norm_eps",
        "unknown",
        "optim.lr",
    ]


def test_sizes_that_follow_from_others_may_be_left_out_or_written(tmp_path: Path) -> None:
    plain = replace(SMOL, nheads_kv=0)
    words = ("model.nheads_kv=4", "model.head_dim=16")
    assert load(tmp_path, FILLED, *words, model=plain).model.nheads_kv == 4


def test_a_missing_source(tmp_path: Path) -> None:
    message = mistakes(tmp_path, '[model]\nfrom = "models/smoll"')
    assert message.startswith("model.from = 'models/smoll': there is no checkpoint")
    assert "lcdist convert import HF_FOLDER models/smoll" in message
    message = mistakes(tmp_path, '[checkpoint]\nload = "models/smoll"')
    assert message.startswith("checkpoint.load = 'models/smoll': there is no checkpoint")
    # A plan may be made before the import, of what is written.
    config = load(tmp_path, FILLED, "checkpoint.load=models/smoll", "model.tied_embeddings=true")
    assert config.model.tied_embeddings and config.model.rope == RopePlain()
    message = mistakes(tmp_path, FILLED, "checkpoint.load=x", "model.rope.extend=yarn:4")
    assert "model.rope.extend = 'yarn:4'" in message and "set model.from" in message
    config = load(tmp_path, FILLED, "checkpoint.load=x", "model.rope.extend=base:8e6")
    assert config.model.rope == RopePlain(base=8e6)


def test_two_sources_are_refused(tmp_path: Path) -> None:
    message = mistakes(tmp_path, '[model]\nfrom = "models/smol"\n[checkpoint]\nload = "b"')
    assert "leave one of them out" in message


EXTENDED = [
    (RopePlain(base=1e5), "pi:4", RopePI(base=1e5, factor=4.0)),
    (RopePlain(base=1e5), "ntk:4", RopeNTK(base=1e5, factor=4.0)),
    (RopePlain(base=1e5), "yarn:2.5", RopeYarn(base=1e5, factor=2.5, original_seqlen=64)),
    (RopePlain(base=1e5), "llama3:8", RopeLlama3(base=1e5, factor=8.0, original_seqlen=64)),
    (RopePlain(base=1e5), "base:8e6", RopePlain(base=8e6)),
    (RopePI(base=1e5, factor=2.0), "pi:4", RopePI(base=1e5, factor=8.0)),
    (
        RopeYarn(factor=4.0, original_seqlen=16, attention_factor=1.1386294361119891),
        "yarn:2",
        RopeYarn(factor=8.0, original_seqlen=16),
    ),
    (
        RopeYarn(factor=4.0, original_seqlen=16, attention_factor=1.5, beta_fast=20.0),
        "yarn:2",
        RopeYarn(factor=8.0, original_seqlen=16, attention_factor=1.5, beta_fast=20.0),
    ),
    (RopeLlama3(factor=8.0), "llama3:4", RopeLlama3(factor=32.0)),
]


@pytest.mark.parametrize(("rope", "word", "expected"), EXTENDED, ids=lambda case: str(case)[:20])
def test_a_rotation_is_extended_by_a_rule_and_a_factor(
    tmp_path: Path, rope: Rope, word: str, expected: Rope
) -> None:
    text = f'[model]\nfrom = "models/smol"\n[model.rope]\nextend = "{word}"'
    assert load(tmp_path, text, model=replace(SMOL, rope=rope)).model.rope == expected


@pytest.mark.parametrize(
    ("rope", "word", "problem"),
    [
        (RopePlain(), "yarn", "must be pi:4"),
        (RopePlain(), "yarn:x", "must be pi:4"),
        (RopePlain(), "abf:4", "must be pi:4"),
        (RopePlain(), "yarn:0.5", "from 1 to"),
        (RopePlain(), "base:1", "from 1 to"),
        (RopePlain(), "longrope:4", "short_factors"),
        (LONG, "yarn:4", "short_factors"),
        (RopeLlama3(), "yarn:4", "only llama3:FACTOR"),
        (RopePI(factor=2.0), "base:8e6", "extend that rule"),
    ],
)
def test_what_does_not_follow_is_refused(rope: Rope, word: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        extend_rope(rope, 64, word)


def test_extend_stands_alone(tmp_path: Path) -> None:
    text = '[model]\nfrom = "models/smol"\n[model.rope]\nextend = "pi:4"\nbase = 5.0'
    assert "leave model.rope.base out" in mistakes(tmp_path, text)
    assert "must be pi:4" in mistakes(tmp_path, FILLED, "model.rope.extend=3")


def test_another_rule_than_the_sources_is_refused(tmp_path: Path) -> None:
    scaled = replace(SMOL, rope=RopeLlama3(base=1e5))
    words = ("model.rope.scaling=pi", "model.rope.factor=4")
    message = mistakes(tmp_path, FILLED, *words, model=scaled)
    assert message.startswith("model.rope.scaling = 'pi': models/smol has 'llama3'")
    # The same rule goes further, with the source's other numbers.
    words = ("model.rope.scaling=llama3", "model.rope.factor=32.0")
    found = load(tmp_path, FILLED, *words, model=scaled).model.rope
    assert found == RopeLlama3(base=1e5, factor=32.0)
    # LongRoPE's factors fit one length, so any rule may take its place.
    long = replace(SMOL, rope=replace(LONG, base=1e5))
    words = ("model.rope.scaling=pi", "model.rope.factor=4")
    assert load(tmp_path, FILLED, *words, model=long).model.rope == RopePI(base=1e5, factor=4)


def test_an_attention_factor_follows_a_written_factor_only_if_it_is_the_formulas(
    tmp_path: Path,
) -> None:
    words = ("model.rope.scaling=yarn", "model.rope.factor=8.0")
    for stored, expected in ((1.1386294361119891, None), (1.5, 1.5)):
        rope = RopeYarn(base=1e5, factor=4.0, original_seqlen=16, attention_factor=stored)
        found = load(tmp_path, FILLED, *words, model=replace(SMOL, rope=rope)).model.rope
        assert found == replace(rope, factor=8.0, attention_factor=expected)


STAGES = """
[[stages]]
name = "short"
train.steps = 2
model.rope.extend = "yarn:4"
[[stages]]
name = "middle"
train.steps = 3
[[stages]]
name = "long"
train.steps = 4
model.rope.extend = "yarn:16"
"""


def test_a_stage_takes_what_is_not_written_from_the_one_before(tmp_path: Path) -> None:
    file = _written(tmp_path, '[model]\nfrom = "models/smol"\n' + REST + STAGES)
    short, middle, long = (stage.config for stage in load_stages(file, (), finder()))
    four = RopeYarn(base=1e5, factor=4.0, original_seqlen=64)
    assert short.model == middle.model == replace(SMOL, rope=four)
    # An extension counts from the import, in every stage.
    assert long.model.rope == replace(four, factor=16.0)
    loads = [config.checkpoint.load for config in (short, middle, long)]
    assert loads == ["models/smol", "runs/new/1-short", "runs/new/2-middle"]


def test_stages_from_random_weights_follow_each_other_too(tmp_path: Path) -> None:
    scratch = FILLED.replace("models/smol", "")
    pi = 'model.rope = { scaling = "pi", factor = 4.0 }'
    stages = STAGES.replace('model.rope.extend = "yarn:4"', pi)
    text = scratch + REST + stages.replace('model.rope.extend = "yarn:16"\n', "")
    configs = [stage.config for stage in load_stages(_written(tmp_path, text), (), finder())]
    assert [config.model.rope for config in configs] == [RopePI(factor=4.0)] * 3


def test_a_run_that_began_needs_its_source_no_more(tmp_path: Path) -> None:
    own = replace(SMOL, rope=RopePI(base=1e5, factor=4.0))
    text = '[model]\nfrom = "models/smol"\n[model.rope]\nextend = "pi:4"'
    assert load(tmp_path, text, model=own, is_own=True).model == own


SCCA = {
    "attention": {"method": "scca", "chunk_size": 64, "impl": "torch"},
    "model": {"rope": {"scaling": "yarn", "factor": 4.0, "original_seqlen": 64, "beta_fast": 9.0}},
}


def merged(*words: str) -> dict[str, Any]:
    errors: list[str] = []
    table = merge_overrides(SCCA, words, errors)
    assert not errors
    return table


def test_another_method_leaves_out_the_options_of_the_files(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert merged("attention.method=full")["attention"] == {"method": "full", "impl": "torch"}
    assert "attention.method=full leaves out attention.chunk_size = 64" in caplog.text
    assert "written for scca" in caplog.text
    words = ("attention.chunk_size=5", "attention.method=scca")
    assert merged(*words)["attention"]["chunk_size"] == 5
    # An option that is given with the method is a mistake of the user, and stays to be told.
    words = ("attention.chunk_size=5", "attention.method=full")
    assert merged(*words)["attention"]["chunk_size"] == 5


def test_another_scaling_keeps_what_both_have(caplog: pytest.LogCaptureFixture) -> None:
    rope = merged("model.rope.scaling=pi")["model"]["rope"]
    assert rope == {"scaling": "pi", "factor": 4.0}
    assert "original_seqlen = 64" in caplog.text and "beta_fast = 9.0" in caplog.text
    assert merged("model.rope.scaling=yarn")["model"] == SCCA["model"]
    assert merged("model.rope.base=5")["model"]["rope"]["beta_fast"] == 9.0
