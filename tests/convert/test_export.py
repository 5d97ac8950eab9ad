"""An export loads in transformers and gives the training model's logits."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

from lcdist.commands.main import main
from lcdist.convert.huggingface.export_model import export_model
from lcdist.convert.huggingface.safetensors import read_header
from tests.convert.hf import (
    export_all,
    import_all,
    logits_of,
    make_model,
    save,
    tokens,
)
from tests.convert.ours import whole_logits
from tests.distributed import run_ranks
from tests.engines.internals import chunks_of
from tests.model.small import Meshes, small
from tests.tolerance import assert_matches

SEQLEN = 40
# The original length of every scaling is 16: 40 tokens exceed it and 12 do not.
LONG = "[1.0, 1.1, 1.3, 1.7, 2.1, 2.6, 3.0, 3.9]"
SHORT = "[1.0, 1.0, 1.05, 1.1, 1.1, 1.2, 1.2, 1.25]"
ROPES = {
    "none": "{scaling='none', base=700.0}",
    "pi": "{scaling='pi', factor=2.5, base=900.0}",
    "ntk": "{scaling='ntk', factor=2.5}",
    "dynamic": "{scaling='dynamic', factor=2.0, original_seqlen=16}",
    "yarn": "{scaling='yarn', factor=2.5, original_seqlen=16, beta_fast=2.0, beta_slow=0.2}",
    "yarn-ends": "{scaling='yarn', factor=3.0, original_seqlen=16, beta_fast=1.5, beta_slow=0.3, "
    "truncate=false, attention_factor=1.3}",
    "llama3": "{scaling='llama3', factor=4.0, original_seqlen=16, base=100.0}",
    "longrope": f"{{scaling='longrope', factor=2.5, original_seqlen=16, short_factors={SHORT}, "
    f"long_factors={LONG}}}",
}
PLAIN = "model.rope={scaling='none'}"
CASES: dict[str, tuple[str, ...]] = {
    **{name: (f"model.rope={rope}",) for name, rope in ROPES.items()},
    "tied": (PLAIN, "model.tied_embeddings=true", "model.nheads_kv=4"),
    "bias": (PLAIN, "model.qkv_bias=true", "model.head_dim=20"),
    "heads": (PLAIN, "model.qk_norm=true", "model.head_dim=20"),
    "scca": (PLAIN, "attention.method=scca", "attention.chunk_size=8"),
}
MESH = ("parallel.tp_size=2", "parallel.sequence_parallel=true")


def train_all(rank: int, world_size: int, folder: Path) -> Any:
    """Train one step of every case, save it on a mesh, and return logits of 12 and 40 tokens."""
    meshes, answers = Meshes(), {}
    for name, words in CASES.items():
        own = (f"train.seqlen={SEQLEN}", "model.init_std=0.25", f"log.folder={folder / name}")
        trainer = meshes.trainer(small(*MESH, *words, *own))
        trainer.engine.forward_backward(trainer.loader.next_step())
        # A learning rate that moves norms away from 1 and biases away from 0.
        trainer.engine.step(0.1)
        trainer.step += 1
        trainer.save(wait=True)
        dense = trainer.plan.shape.attention_name == "full"
        answers[name] = [
            whole_logits(chunks_of(trainer), trainer.mesh, trainer.plan, tokens(count))
            for count in ((12, SEQLEN) if dense else ())
        ]
    return answers


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return the folder of runs, with exports under hf/, and our logits by case."""
    folder = tmp_path_factory.mktemp("runs")
    logits = run_ranks(train_all, 2, folder, timeout=120)[0]
    jobs = [(folder / name, folder / "hf" / name, 100_000) for name in CASES]
    run_ranks(export_all, 1, jobs)
    return folder, logits


@pytest.mark.parametrize("case", [name for name in CASES if name != "scca"])
def test_transformers_logits_match_ours(case: str, trained: tuple[Path, Any]) -> None:
    """Cover every scaling rule below and beyond the original length, tied weights and biases."""
    folder, logits = trained
    for count, ours in zip((12, SEQLEN), logits[case], strict=True):
        assert_matches(logits_of(folder / "hf" / case, tokens(count)), ours, 1e-5)


def test_config_records_the_training(trained: tuple[Path, Any]) -> None:
    folder, _ = trained
    table = json.loads((folder / "hf" / "scca" / "config.json").read_text())
    assert table["lcdist"]["method"] == "scca"
    assert table["lcdist"]["options"]["chunk_size"] == 8
    assert table["lcdist"]["seqlen"] == table["max_position_embeddings"] == SEQLEN
    assert table["lcdist"]["step"] == 1 and table["lcdist"]["rope"]["scaling"] == "none"
    assert table["architectures"] == ["LlamaForCausalLM"] and table["rope_scaling"] is None
    assert table["eos_token_id"] is None  # LLaMA's default would be its tokenizer's id


def test_shards_respect_the_maximum_size(trained: tuple[Path, Any]) -> None:
    """Check the index against the safetensors library too."""
    folder = trained[0] / "hf" / "yarn"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    total = 0
    for name in files:
        held = read_header(folder / name)
        nbytes = sum(entry.nbytes for entry in held.values())
        assert nbytes <= 100_000 or len(held) == 1
        total += nbytes
        with safe_open(folder / name, "pt") as opened:
            assert {*opened.keys()} == {
                t for t, file in index["weight_map"].items() if file == name
            }
    assert total == index["metadata"]["total_size"]


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUND = [
    ("llama3", "float32"),
    ("llama2", "float32"),
    ("mistral", "float32"),
    ("qwen2", "bfloat16"),
    ("qwen3", "bfloat16"),
]
FOLDERS = ("hf", "ours", "back")
SPECIAL = {"bos_token_id": 7, "eos_token_id": 9}


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Import and export each family; return the parent of hf/, ours/ and back/."""
    folder = tmp_path_factory.mktemp("round")
    inward, outward = [], []
    for family, name in ROUND:
        source, ours, back = (folder / kind / f"{family}-{name}" for kind in FOLDERS)
        save(make_model(family, **SPECIAL).to(DTYPES[name]), source)
        inward.append((source, ours, ()))
        outward.append((ours, back, 60_000))
    run_ranks(import_all, 1, inward)
    run_ranks(export_all, 1, outward)
    return folder


@pytest.mark.parametrize(("family", "dtype"), ROUND)
def test_round_trip_is_bit_equal(family: str, dtype: str, round_trip: Path) -> None:
    """Compare every tensor, the configuration and the ids of special tokens."""
    source, _, back = (round_trip / kind / f"{family}-{dtype}" for kind in FOLDERS)
    theirs, ours = read_all(source), read_all(back)
    assert theirs.keys() == ours.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype == DTYPES[dtype]
        assert torch.equal(ours[name], expected), name
    first, second = (AutoConfig.from_pretrained(path) for path in (source, back))
    same = ("hidden_size", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")
    same += ("rope_parameters", "max_position_embeddings", "bos_token_id", "eos_token_id", "dtype")
    for key in same:
        assert getattr(first, key) == getattr(second, key), key


def test_a_flipped_bit_is_found_in_what_was_written(
    round_trip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, dtype = ROUND[0]
    _, ours, back = (round_trip / kind / f"{family}-{dtype}" for kind in FOLDERS)
    copy = Path(shutil.copytree(back, tmp_path / "copy"))
    assert main(["check", str(ours), str(copy)]) == 0
    assert capsys.readouterr().out.count(", whole\n") == 3
    file = sorted(copy.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["check", str(copy)]) == 2
    assert f"file {file.name} has sha256 " in capsys.readouterr().out
    assert main(["convert", "import", str(copy), str(tmp_path / "again")]) == 2
    assert f"error: {copy} is damaged: file {file.name} has sha256 " in capsys.readouterr().err


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            found |= {name: opened.get_tensor(name) for name in names}
    return found


ODD = {
    "heads": ("model.nheads=6", "model.head_dim=16"),
    "lora": ("lora.rank=2",),
}


def save_odd(rank: int, world_size: int, folder: Path) -> None:
    meshes = Meshes()
    for name, words in ODD.items():
        meshes.trainer(small(*words, f"log.folder={folder / name}")).save(wait=True)


def test_model_without_a_hugging_face_form_is_rejected(tmp_path: Path) -> None:
    run_ranks(save_odd, 1, tmp_path)
    with pytest.raises(ValueError, match=r"has LoRA adapters: .*\(lcdist convert merge\)"):
        export_model(tmp_path / "lora", tmp_path / "hf")
    with pytest.raises(ValueError, match="nheads = 6: transformers cannot load such a model"):
        export_model(tmp_path / "heads", tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {*ODD}
