"""Everything wrong with a source is refused by name, before anything is written."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcdist.convert.huggingface.export_model import export_model
from lcdist.convert.huggingface.import_model import import_model
from tests.convert.hf import make_model, save

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00005.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded model with a tokenizer of 250 tokens."""
    folder = save(make_model(num_hidden_layers=2), tmp_path_factory.mktemp("good"), "60KB")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(250)))
    return folder


@pytest.fixture
def source(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "hf"))


def tokenizer(count: int) -> dict[str, Any]:
    """A tokenizer.json whose last token is an added one."""
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


def whole(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """All tensors in one file, after `change`."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / INDEX).unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    file = folder / FIRST
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 4)


def cut_header(folder: Path) -> None:
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:20])


def lengthen(folder: Path) -> None:
    with (folder / FIRST).open("ab") as stream:
        stream.write(b"more")


def pickled(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def tie_badly(folder: Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=True)


Q = "model.layers.1.self_attn.q_proj.weight"
SOURCES: dict[str, Callable[[Path], Any]] = {
    f"{FIRST} is truncated: ": truncate,
    f"{FIRST} is truncated or no safetensors file: 20 bytes": cut_header,
    f"{FIRST} has bytes of no tensor": lengthen,
    f"names {FIRST}, missing here$": lambda f: (f / FIRST).unlink(),
    f"names {FIRST}, missing here; it names none of odd.safetensors, which": lambda f: (
        f / FIRST
    ).rename(f / "odd.safetensors"),
    f"lm_head.weight is said to be in {FIRST}, which has no such": edit_index(
        lambda where: where.update({"lm_head.weight": FIRST})
    ),
    "has model.layers.0.input_layernorm.weight, of which it says nothing": edit_index(
        lambda where: where.pop("model.layers.0.input_layernorm.weight")
    ),
    "in '../x.safetensors': must be a .safetensors file beside it": edit_index(
        lambda where: where.update({"lm_head.weight": "../x.safetensors"})
    ),
    f"{Q} is missing; the config asks for it with shape \\[80, 48\\]": lambda f: whole(
        f, lambda tensors: tensors.pop(Q)
    ),
    f"{Q} has shape \\[40, 48\\]; the config says \\[80, 48\\]": lambda f: whole(
        f, lambda tensors: tensors.update({Q: torch.zeros(40, 48)})
    ),
    "layers.2.x \\[3\\] belongs to nothing": lambda f: whole(
        f, lambda tensors: tensors.update({"model.layers.2.x": torch.zeros(3)})
    ),
    f"{Q} is of dtype I8": lambda f: whole(
        f, lambda tensors: tensors.update({Q: torch.zeros(80, 48, dtype=torch.int8)})
    ),
    "pytorch_model.bin, which can run code .* convert to safetensors first": pickled,
    "has no weights": lambda f: [file.unlink() for file in f.glob("model*")],
    "and neither model.safetensors nor": lambda f: (f / INDEX).unlink(),
    "it has no config.json": lambda f: (f / "config.json").unlink(),
    "tokens up to number 250, and the model has 250": lambda f: (f / "tokenizer.json").write_text(
        json.dumps(tokenizer(251))
    ),
    "lm_head.weight differs from model.embed_tokens.weight": tie_badly,
    # What config.json can say that is not here, or not true.
    "vocab_size is missing": edit_config(vocab_size=None),
    "embed_tokens.weight has shape \\[250, 48\\]; the config says \\[260, 48\\]": edit_config(
        vocab_size=260
    ),
    "layers.2.mlp.gate_proj.weight is missing": edit_config(num_hidden_layers=3),
    "layers.1.mlp.gate_proj.weight .* belongs to nothing": edit_config(num_hidden_layers=1),
    "k_proj.weight has shape \\[40, 48\\]; the config says \\[80, 48\\]": edit_config(
        num_key_value_heads=4
    ),
    "is not a multiple of num_key_value_heads = 3": edit_config(num_key_value_heads=3),
    "hidden_act = 'gelu': the activation": edit_config(hidden_act="gelu"),
    "attention_bias = True: biases on all four": edit_config(attention_bias=True),
    "mlp_bias = True": edit_config(mlp_bias=True),
    "quantization_config = .*: quantized weights": edit_config(quantization_config={"bits": 4}),
    "final_logit_softcapping = 30.0: capped": edit_config(final_logit_softcapping=30.0),
    "partial_rotary_factor = 0.5": edit_config(partial_rotary_factor=0.5),
    "auto_map = .*: code of the model's own": edit_config(auto_map={"AutoModel": "x.Y"}),
    "embedding_multiplier = 12.0: not known here": edit_config(embedding_multiplier=12.0),
    "architectures = \\['GemmaForCausalLM'\\]: must be one of": edit_config(
        architectures=["GemmaForCausalLM"]
    ),
    "model_type = 'qwen3' is not that of LlamaForCausalLM": edit_config(model_type="qwen3"),
    "sliding_window = 39 is shorter than max_position_embeddings = 40": edit_config(
        architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=39
    ),
    "sliding_window = 4096 is shorter than max_position_embeddings = 5000": edit_config(
        architectures=["MistralForCausalLM"], model_type="mistral", max_position_embeddings=5000
    ),
    "layer_types has sliding_attention": edit_config(
        layer_types=["full_attention", "sliding_attention"]
    ),
    "type 'su' is not known": edit_config(rope_parameters={"rope_type": "su", "rope_theta": 1e4}),
    "lcdist.method = 'coca'": edit_config(lcdist={"method": "coca"}),
    "lcdist.seqlen = '9'": edit_config(lcdist={"method": "full", "seqlen": "9"}),
}


@pytest.mark.parametrize("said", SOURCES)
def test_a_bad_source_is_named(said: str, source: Path, tmp_path: Path) -> None:
    SOURCES[said](source)
    with pytest.raises(ValueError, match=said):
        import_model(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


OVERRIDES = {
    "model.hidden_size = 64: config.json says 48": ["model.hidden_size=64"],
    "model.vocab_size = 200: the model has 250 tokens": ["model.vocab_size=200"],
    "model.rope = .*: config.json says": ["model.rope.base=500.0"],
    "is not a multiple of parallel.tp_size = 3": ["parallel.tp_size=3"],
    "unknown key 'train.step'": ["train.step=3"],
}


@pytest.mark.parametrize("said", OVERRIDES)
def test_an_import_keeps_the_model(said: str, good: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        import_model(good, tmp_path / "out", OVERRIDES[said])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_left_alone(good: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists: choose another folder"):
        import_model(good, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_seen_before(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 900_000, 100_000))
    with pytest.raises(ValueError, match="no room for .*out: 0.00 GiB are needed"):
        import_model(good, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_conversion_is_the_work_of_one_process(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it without torchrun"):
        import_model(good, tmp_path / "out")


def test_what_is_no_checkpoint_is_not_exported(tmp_path: Path) -> None:
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
def test_what_changes_nothing_is_let_through(
    change: Callable[[Path], None], source: Path, tmp_path: Path
) -> None:
    """A window no shorter than the context, keys for training, switches that are off."""
    change(source)
    with pytest.raises(ValueError, match="model.hidden_size = 64"):
        import_model(source, tmp_path / "out", ["model.hidden_size=64"])
