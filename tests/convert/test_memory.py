"""Conversions never hold the whole model: growth of resident memory in a separate process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 80_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
# Without these, glibc keeps 30 to 80 MB of freed memory, varying from run to run.
RETURN_FREED = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
}
PROGRAM = """
import sys
from pathlib import Path
import torch
from lcdist.convert.huggingface.import_model import import_model
from lcdist.convert.huggingface.export_model import export_model

def resident(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024

torch.set_num_threads(1)
source, out, tiny = map(Path, sys.argv[2:5])
convert = {"import": import_model, "export": export_model}[sys.argv[1]]
convert(tiny, out.with_name(out.name + "-tiny"))  # loads what every conversion needs
before = resident("VmRSS")
convert(source, out)
print(resident("VmHWM") - before)
"""


def write_model(folder: Path, **changes: int) -> int:
    """Write a random model with one shard per layer; return its bytes."""
    table = {**SHAPE, **changes}
    hidden, ffn = table["hidden_size"], table["intermediate_size"]
    keys = hidden // 2
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(table))
    where, total = {}, 0
    for number in range(-1, table["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        named = {f"{layer}{name}.weight": shape for name, shape in shapes.items()}
        if number < 0:
            vocab = (table["vocab_size"], hidden)
            named = {"model.embed_tokens.weight": vocab, "lm_head.weight": vocab}
            named["model.norm.weight"] = (hidden,)
        tensors = {name: torch.randn(shape) * 0.05 for name, shape in named.items()}
        file = f"model-{number + 1}.safetensors"
        save_file(tensors, folder / file)
        where |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def growth(direction: str, source: Path, out: Path, tiny: Path) -> int:
    words = [sys.executable, "-c", PROGRAM, direction, str(source), str(out), str(tiny)]
    environment = os.environ | RETURN_FREED
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.exhaustive
def test_conversions_do_not_hold_the_model(tmp_path: Path) -> None:
    """Allow a third of the bytes of a model of 530 MB."""
    small = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 16, "num_hidden_layers": 1}
    write_model(tmp_path / "tiny", **small)
    total = write_model(tmp_path / "hf")
    assert total > 520e6
    found = growth("import", tmp_path / "hf", tmp_path / "ours", tmp_path / "tiny")
    assert found < total / 3, f"import: {found / 1e6:.0f} MB for a model of {total / 1e6:.0f} MB"
    tiny = tmp_path / "ours-tiny"
    found = growth("export", tmp_path / "ours", tmp_path / "back", tiny)
    assert found < total / 3, f"export: {found / 1e6:.0f} MB for a model of {total / 1e6:.0f} MB"
