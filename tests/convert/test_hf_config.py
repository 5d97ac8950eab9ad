"""Published config.json files give the models that their cards describe."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lcdist.config.rope import RopeLlama3, RopePlain
from lcdist.convert.huggingface.config import read_config
from lcdist.convert.huggingface.names import hf_shapes

COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0",
    "use_cache": True,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False}
LLAMA2 = {
    **COMMON,
    **LLAMA,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "vocab_size": 32000,
    "_name_or_path": "somewhere",
}
LLAMA31 = {
    **COMMON,
    **LLAMA,
    "eos_token_id": [128001, 128008, 128009],
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
MISTRAL = {
    **COMMON,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32768,
}
QWEN25 = {
    **COMMON,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3 = {
    **COMMON,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# Parameters in millions, from the model cards.
PUBLISHED = {
    "Llama 2 7B": (LLAMA2, 6738.4),
    "Llama 3.1 8B": (LLAMA31, 8030.3),
    "Mistral 7B 0.3": (MISTRAL, 7248.0),
    "Qwen 2.5 7B": (QWEN25, 7615.6),
    "Qwen 3 8B": (QWEN3, 8190.7),
}


def write(folder: Path, table: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(table))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_model_has_its_parameter_count(name: str, tmp_path: Path) -> None:
    table, millions = PUBLISHED[name]
    hf = read_config(write(tmp_path, table))
    total = sum(math.prod(shape) for shape in hf_shapes(hf.model).values())
    assert total / 1e6 == pytest.approx(millions, abs=0.1)
    assert hf.seqlen == table["max_position_embeddings"]
    assert hf.model.qkv_bias == (name == "Qwen 2.5 7B")
    assert hf.model.qk_norm == (name == "Qwen 3 8B")
    expected = RopeLlama3(factor=8.0, original_seqlen=8192, base=500000.0)
    plain = RopePlain(base=table.get("rope_theta", 10000.0))
    assert hf.model.rope == (expected if name == "Llama 3.1 8B" else plain)


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    table = {**LLAMA31, "hidden_act": "gelu", "mlp_bias": True, "head_dim": 0, "scale": 3}
    table["rope_scaling"] = {"rope_type": "odd"}
    with pytest.raises(ValueError) as caught:
        read_config(write(tmp_path, table))
    lines = str(caught.value).splitlines()
    assert len(lines) == 5 and all("config.json: " in line for line in lines)
    for message in ("head_dim = 0", "hidden_act", "mlp_bias", "scale = 3: unknown", "type 'odd'"):
        assert sum(message in line for line in lines) == 1, (message, lines)
