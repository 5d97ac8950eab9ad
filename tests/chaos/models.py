"""Generate Hugging Face folders: other keys in config.json, changed headers, other shapes."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save

from lcdist.convert.check import LogitDifference
from lcdist.convert.huggingface.config import read_config
from lcdist.convert.huggingface.import_model import import_model
from lcdist.convert.huggingface.names import hf_shapes
from lcdist.distributed.mesh import end_world
from tests.chaos.inputs import ABSURD, BYTE_CHANGES, Kind, changed
from tests.chaos.tally import REFUSED

MEANING = (
    "the import ends and its checkpoint gives the logits of the source, or ValueError and nothing "
    "is written"
)
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
SIZES = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}
BASE: dict[str, Any] = {
    **SIZES,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
OTHER_KEYS = ["head_dim", "rope_scaling", "rope_parameters", "sliding_window", "layer_types",
              "lcdist", "architectures", "model_type", "use_sliding_window", "auto_map",
              "original_max_position_embeddings", "attention_bias", "unknown"]  # fmt: skip
ROPE_KEYS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 8, "mscale": 1.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0], "attention_factor": 1.0},
}


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any]:
    """Generate rotary keys of a type, half of the time with another value or key."""
    kind = draw(st.sampled_from(sorted(ROPE_KEYS)))
    table = {"rope_type": kind, **ROPE_KEYS[kind]}
    if draw(st.booleans()):
        keys = [*table, "rope_theta", "original_max_position_embeddings", "truncate", "other"]
        table[draw(st.sampled_from(keys))] = draw(ABSURD)
    return table


DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
# A tokenizer that fits the model, to which changes are made.
TOKENIZER = {"model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(20)}, "merges": []}}


@st.composite
def folders(draw: st.DrawFn) -> dict[str, Any]:
    """Generate changes in up to two places, so that what is behind the first check is reached."""
    places = ["keys", "rope", "tensor", "header", "config", "tokenizer"]
    chosen = draw(st.lists(st.sampled_from(places), max_size=2, unique=True))

    def changes(place: str, strategy: st.SearchStrategy, otherwise: Any) -> Any:
        return draw(strategy) if place in chosen else otherwise

    key = st.sampled_from([*BASE, *OTHER_KEYS])
    entry = st.one_of(ABSURD, st.sampled_from([1, 2, 3, 4, 8, 16, 24]))
    rope = changes("rope", st.sampled_from(["rope_scaling", "rope_parameters"]), None)
    keys = changes("keys", st.dictionaries(key, entry, min_size=1, max_size=2), {})
    faults = st.sampled_from(["shape", "dtype", "missing", "unknown", "nan", "0"])
    tokenizers = st.dictionaries(st.sampled_from(["model", "added_tokens"]), ABSURD, max_size=1)
    return {
        "family": draw(st.sampled_from(sorted(FAMILIES))),
        "keys": keys if rope is None else {**keys, rope: draw(ropes())},
        "tensor": [
            changes("tensor", faults, ""),
            draw(st.integers(0, 20)),
            draw(st.sampled_from(sorted(DTYPES))),
        ],
        "header": changes("header", BYTE_CHANGES, []),
        "config": changes("config", BYTE_CHANGES, []),
        "tokenizer": changes("tokenizer", tokenizers, None),
    }


@cache
def _weights(family: str) -> dict[str, torch.Tensor]:
    """Return random weights of the unchanged model of a family."""
    table = {**BASE, "architectures": [FAMILIES[family]], "model_type": family}
    table |= {"sliding_window": None}
    chance = torch.Generator().manual_seed(0)
    shapes = hf_shapes(_model(table))
    return {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()}


def _model(table: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(table))
        return read_config(Path(folder)).model


def write_folder(value: Any, folder: Path) -> None:
    """Write the Hugging Face folder that an input describes."""
    family, (change, number, dtype) = value["family"], value["tensor"]
    table = {**BASE, "architectures": [FAMILIES[family]], "model_type": family}
    table |= {"sliding_window": None, **value["keys"]}
    weights = dict(_weights(family))
    name = sorted(weights)[number % len(weights)]
    if change == "shape":
        weights[name] = torch.zeros(number, 8)
    elif change == "dtype":
        weights[name] = weights[name].to(DTYPES[dtype])
    elif change == "missing":
        del weights[name]
    elif change == "unknown":
        weights["model.layers.7.other"] = torch.zeros(3)
    elif change == "nan":
        weights[name] = torch.full_like(weights[name], torch.nan)
    elif change == "0":
        weights[name] = torch.zeros(0, 8)
    folder.mkdir()
    content = save(weights, metadata={"format": "pt"})
    end = 8 + int.from_bytes(content[:8], "little")
    (folder / "model.safetensors").write_bytes(
        changed(content[:end], value["header"]) + content[end:]
    )
    text = json.dumps(table).encode()
    (folder / "config.json").write_bytes(changed(text, value["config"]))
    if value["tokenizer"] is not None:
        (folder / "tokenizer.json").write_text(json.dumps({**TOKENIZER, **value["tokenizer"]}))


def attempt(value: Any, folder: Path) -> str | None:
    """Import the folder; return what went wrong."""
    source, out = folder / "hf", folder / "out"
    write_folder(value, source)
    try:
        result = import_model(source, out)
    except ValueError as error:
        if out.exists():
            return "an error, and a folder nevertheless"
        return REFUSED if str(error).strip() else "an error without a text"
    finally:
        end_world()
    difference: LogitDifference = result.difference
    if not difference.max_difference < 1e-2 or value["tensor"][0] in ("nan", "missing", "0"):
        return f"imported with {value['tensor']}, logits differ by {difference.max_difference}"
    return None


MODELS = Kind("Hugging Face folders", MEANING, 300, folders(), attempt)
