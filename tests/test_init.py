"""`lcdist init`: a configuration for a model, a length and a number of GPUs."""

import json
import re
from pathlib import Path

import pytest

from lcdist.attention import METHODS
from lcdist.commands.main import main
from lcdist.config import dump, load
from lcdist.config.schema import Config
from lcdist.config.source import Source
from lcdist.config.stages import load_stages
from lcdist.convert.huggingface.config import read_config
from lcdist.hardware.gpu_specs import GPU_SPECS
from lcdist.plan import make_plan
from lcdist.plan.recipe import RECIPES
from lcdist.rundir.paths import CHECKPOINTS, MANIFEST

ROOT = Path(__file__).parent.parent

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_2_7B))
    return folder


def made(tmp_path: Path, hf: Path, text: str, more: int = 0) -> Config:
    """Return the configuration of a text, whose import does not exist."""
    file, model = tmp_path / "my.toml", read_config(hf).model
    file.write_text(text)
    source = Source("llama", model.__class__(**{**vars(model), "vocab_size": 32000 + more}), 4096)
    ((_, config),) = (vars(s).values() for s in load_stages(file, (), lambda *_: source))
    return config


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", METHODS)
def test_what_it_writes_fits(
    recipe: str, method: str, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["init", recipe, str(hf), "--method", method, "--length", "65536", "--gpus", "16"]
    assert main(words) == 0
    text = capsys.readouterr().out
    config = made(tmp_path, hf, text, more=method == "landmark")
    plan = make_plan(config, 16, GPU_SPECS["h100"])
    assert plan.memory.device_bytes <= plan.memory.usable_bytes
    assert config.train.seqlen == 65536 and config.attention.method == method
    assert bool(config.lora.rank) == (recipe == "lora")
    assert config.train.global_batch_size * 65536 == 2**21
    assert config.checkpoint.load == "models/llama" and config.data.path == "data/long"
    scaled = {"none", "pi" if recipe == "lora" else "yarn"}
    assert {config.model.rope.scaling} == (
        {"none"} if method == "tensorized" else scaled - {"none"}
    )
    # The commands that it names make what the file names.
    more = " --extra-tokens 1" if method == "landmark" else ""
    assert f"#   lcdist convert import {hf} models/llama{more}\n" in text
    assert f"#   lcdist tokenize TEXT data/long --tokenizer {hf}\n" in text
    assert all(len(line) <= 100 for line in text.splitlines() if str(hf) not in line)


def test_an_import_needs_no_other_import(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # An import keeps the original's config.json beside its checkpoint.
    step = hf / CHECKPOINTS / "step_00000000"
    step.mkdir(parents=True)
    (hf / CHECKPOINTS / "latest").write_text("step_00000000\n")
    config = load(ROOT / "configs" / "debug" / "full.toml")
    (step / MANIFEST).write_text(json.dumps({"config": dump(config)}))
    assert main(["init", "extend", str(hf), "--gpus", "1"]) == 0
    text = capsys.readouterr().out
    assert f'from = "{hf}"' in text and "made for 256 tokens, at 1,024" in text
    assert "convert import" not in text
    assert f"#   lcdist tokenize TEXT data/long --tokenizer {hf}\n" in text


def test_the_number_of_gpus_that_it_names_is_the_least(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["init", "extend", str(hf), "--length", "131072", "--hardware", "a100-40gb", "--gpus"]
    assert main([*words, "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --gpus 1: 131,072 tokens need ") and error.count("\n") == 1
    found = re.search(r"use --gpus (\d+), or the recipe lora$", error.strip())
    assert found is not None
    assert main([*words, str(int(found[1]) // 2)]) == 2
    assert main([*words, found[1]]) == 0
    config = made(tmp_path, hf, capsys.readouterr().out)
    assert make_plan(config, int(found[1]), GPU_SPECS["a100-40gb"]).dp_size >= 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["extend", "nowhere"], "nowhere: neither a checkpoint nor a Hugging Face folder"),
        (["pretrain", "HF"], "is none of extend, lora"),
        (["extend", "HF", "--method", "coco"], "--method coco: must be one of coca, full"),
        (["extend", "HF", "--gpus", "0"], "--gpus 0: must be at least 1"),
        (["extend", "HF", "--length", "-5"], "--length -5: must be at least 1"),
    ],
)
def test_mistakes(
    words: list[str], told: str, hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", *(str(hf) if word == "HF" else word for word in words)]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
