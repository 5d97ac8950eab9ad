"""An invalid source is rejected with a message that names the problem; nothing is written."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcdist.commands.main import main
from lcdist.convert.huggingface.export_model import export_model
from lcdist.convert.huggingface.import_model import import_model
from tests.convert.hf import make_model, save

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00005.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a sharded model with a tokenizer of 250 tokens."""
    folder = save(make_model(num_hidden_layers=2), tmp_path_factory.mktemp("good"), "60KB")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(250)))
    return folder


@pytest.fixture
def source(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "hf"))


def tokenizer(count: int) -> dict[str, Any]:
    """Return a tokenizer.json of `count` tokens; the last is an added token."""
    vocab = {f"t{i}": i for i in range(count - 1)}
    return {"model": {"type": "BPE", "vocab": vocab}, "added_tokens": [{"id": count - 1}]}


def edit(file: Path, **changes: Any) -> None:
    table = json.loads(file.read_text())
    file.write_text(json.dumps({**table, **changes}))


def edit_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **changes)


def edit_index(change: Callable[[dict[str, str]], None]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        table = json.loads((folder / INDEX).read_text())
        change(table["weight_map"])
        (folder / INDEX).write_text(json.dumps(table))

    return act


def merge_shards(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the shards as one file, after `change`."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / INDEX).unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_gguf_is_named_with_the_way_to_safetensors(
    good: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file by its name or its first bytes, and a folder that has no other weights."""
    folder = tmp_path / "quantized"
    folder.mkdir()
    shutil.copy(good / "config.json", folder)
    file = folder / "model-Q4_K_M.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00")
    unnamed = Path(shutil.copy(file, tmp_path / "blob"))
    for given, name in ((folder, file.name), (file, file.name), (unnamed, "blob")):
        assert main(["extend", "--model", str(given)]) == 2
        said = capsys.readouterr()
        [line] = (said.out + said.err).splitlines()
        assert str(given) in line and "GGUF" in line and "hf download" in line
        assert f"gguf_file={name!r}" in line and "save_pretrained" in line
        with pytest.raises(ValueError, match="GGUF"):
            import_model(given, tmp_path / "out")
    with pytest.raises(ValueError, match="model.safetensors.index.json: a file, not a folder"):
        import_model(source / INDEX, tmp_path / "out")
    # Beside safetensors it is a copy of them.
    shutil.copy(file, source)
    assert import_model(source, tmp_path / "out").num_parameters


def truncate(folder: Path) -> None:
    file = folder / FIRST
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 4)


def cut_header(folder: Path) -> None:
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:20])


def append_bytes(folder: Path) -> None:
    with (folder / FIRST).open("ab") as stream:
        stream.write(b"more")


def save_pickle(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def tie_different_tensors(folder: Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=True)


Q = "model.layers.1.self_attn.q_proj.weight"
SOURCES: dict[str, Callable[[Path], Any]] = {
    f"{FIRST} \\(48124 bytes\\) is truncated, .*; copy or download it again$": truncate,
    f"{FIRST} \\(20 bytes\\) is truncated, damaged or no safetensors file": cut_header,
    f"{FIRST} \\(48132 bytes\\) is truncated, damaged or no safetensors file": append_bytes,
    f"names {FIRST}, missing in the folder$": lambda f: (f / FIRST).unlink(),
    f"names {FIRST}, missing in the folder; it does not name odd.safetensors, which": lambda f: (
        f / FIRST
    ).rename(f / "odd.safetensors"),
    f"{FIRST} lacks lm_head.weight": edit_index(
        lambda where: where.update({"lm_head.weight": FIRST})
    ),
    "has model.layers.0.input_layernorm.weight, which is not indexed": edit_index(
        lambda where: where.pop("model.layers.0.input_layernorm.weight")
    ),
    "in '../x.safetensors': must be a .safetensors file in the same folder": edit_index(
        lambda where: where.update({"lm_head.weight": "../x.safetensors"})
    ),
    f"{Q} is missing; config.json implies shape \\[80, 48\\]": lambda f: merge_shards(
        f, lambda tensors: tensors.pop(Q)
    ),
    f"{Q} has shape \\[40, 48\\]; config.json implies \\[80, 48\\]": lambda f: merge_shards(
        f, lambda tensors: tensors.update({Q: torch.zeros(40, 48)})
    ),
    "layers.2.x \\[3\\] is not a tensor of the model": lambda f: merge_shards(
        f, lambda tensors: tensors.update({"model.layers.2.x": torch.zeros(3)})
    ),
    f"{Q} has dtype I8": lambda f: merge_shards(
        f, lambda tensors: tensors.update({Q: torch.zeros(80, 48, dtype=torch.int8)})
    ),
    f"{Q}, row 7, has a weight that is not finite": lambda f: merge_shards(
        f, lambda tensors: tensors[Q][7].fill_(float("inf"))
    ),
    "pytorch_model.bin, which can run code .* convert to safetensors first": save_pickle,
    "has no weights": lambda f: [file.unlink() for file in f.glob("model*")],
    "and neither model.safetensors nor": lambda f: (f / INDEX).unlink(),
    "it has no config.json": lambda f: (f / "config.json").unlink(),
    "token ids up to 250, and the model has 250": lambda f: (f / "tokenizer.json").write_text(
        json.dumps(tokenizer(251))
    ),
    "lm_head.weight differs from model.embed_tokens.weight": tie_different_tensors,
    # Unsupported or wrong keys of config.json.
    "vocab_size is missing": edit_config(vocab_size=None),
    "embed_tokens.weight has shape \\[250, 48\\]; config.json implies \\[260, 48\\]": edit_config(
        vocab_size=260
    ),
    "layers.2.mlp.gate_proj.weight is missing": edit_config(num_hidden_layers=3),
    "layers.1.mlp.gate_proj.weight .* is not a tensor of the model": edit_config(
        num_hidden_layers=1
    ),
    "k_proj.weight has shape \\[40, 48\\]; config.json implies \\[80, 48\\]": edit_config(
        num_key_value_heads=4
    ),
    "is not a multiple of num_key_value_heads = 3": edit_config(num_key_value_heads=3),
    "hidden_act = 'gelu': the activation": edit_config(hidden_act="gelu"),
    "attention_bias = True: biases on all four": edit_config(attention_bias=True),
    "mlp_bias = True": edit_config(mlp_bias=True),
    "quantization_config = .*: quantized weights": edit_config(quantization_config={"bits": 4}),
    "final_logit_softcapping = 30.0: capped": edit_config(final_logit_softcapping=30.0),
    "partial_rotary_factor = 0.5": edit_config(partial_rotary_factor=0.5),
    "auto_map = .*: custom model code": edit_config(auto_map={"AutoModel": "x.Y"}),
    "embedding_multiplier = 12.0: unknown to lcdist": edit_config(embedding_multiplier=12.0),
    "architectures = \\['GemmaForCausalLM'\\]: must be one of": edit_config(
        architectures=["GemmaForCausalLM"]
    ),
    "model_type = 'qwen3' is not the model type of LlamaForCausalLM": edit_config(
        model_type="qwen3"
    ),
    "sliding_window = 39 is shorter than max_position_embeddings = 40": edit_config(
        architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=39
    ),
    "sliding_window = 4096 is shorter than max_position_embeddings = 5000": edit_config(
        architectures=["MistralForCausalLM"], model_type="mistral", max_position_embeddings=5000
    ),
    "layer_types has sliding_attention": edit_config(
        layer_types=["full_attention", "sliding_attention"]
    ),
    "type 'su' is unknown": edit_config(rope_parameters={"rope_type": "su", "rope_theta": 1e4}),
    "lcdist.method = 'coca'": edit_config(lcdist={"method": "coca"}),
    "lcdist.seqlen = '9'": edit_config(lcdist={"method": "full", "seqlen": "9"}),
}


@pytest.mark.parametrize("message", SOURCES)
def test_invalid_source_is_rejected(message: str, source: Path, tmp_path: Path) -> None:
    SOURCES[message](source)
    with pytest.raises(ValueError, match=message):
        import_model(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


OVERRIDES = {
    "model.hidden_size = 64: config.json says 48": ["model.hidden_size=64"],
    "model.vocab_size = 200: the model has 250 tokens": ["model.vocab_size=200"],
    "model.rope = .*: config.json says": ["model.rope.base=500.0"],
    "is not a multiple of parallel.tp_size = 3": ["parallel.tp_size=3"],
    "unknown key 'train.step'": ["train.step=3"],
}


@pytest.mark.parametrize("message", OVERRIDES)
def test_override_that_changes_the_model_is_rejected(
    message: str, good: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        import_model(good, tmp_path / "out", OVERRIDES[message])
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_not_overwritten(good: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists: choose another folder"):
        import_model(good, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_full_disk_is_reported_before_writing(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 900_000, 100_000))
    with pytest.raises(ValueError, match="no room for .*out: 0.00 GiB are needed"):
        import_model(good, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_several_processes_are_rejected(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it without torchrun"):
        import_model(good, tmp_path / "out")


def test_export_without_a_checkpoint_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        export_model(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ValueError, match="shard size of 0 bytes"):
        export_model(tmp_path / "none", tmp_path / "out", 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        edit_config(sliding_window=40, architectures=["MistralForCausalLM"], model_type="mistral"),
        edit_config(pretraining_tp=2, attention_dropout=0.1, torch_dtype="float16"),
        edit_config(some_switch=False, other=None),
    ],
)
def test_harmless_config_key_is_accepted(
    change: Callable[[Path], None], source: Path, tmp_path: Path
) -> None:
    """Accept a window no shorter than the context, training keys, and false switches."""
    change(source)
    with pytest.raises(ValueError, match="model.hidden_size = 64"):
        import_model(source, tmp_path / "out", ["model.hidden_size=64"])
