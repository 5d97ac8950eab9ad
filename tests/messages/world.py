"""A folder with a model, text, tokens and a run, in which mistakes are made."""

import json
import shutil
from pathlib import Path

from lcdist.commands.main import main
from tests.launch.conftest import write_documents

# A configuration that the commands below take, for the run in `runs/short`.
MODEL = """[model]
vocab_size = 400
num_layers = 2
hidden_size = 32
nheads = 4
nheads_kv = 1
ffn_hidden_size = 64
"""
REST = """
[data]
path = "data/text"

[train]
seqlen = 64
steps = 2
micro_batch_size = 1
global_batch_size = 4

[log]
folder = "runs/short"
tensorboard = false
"""


def make_world(folder: Path) -> None:
    """Fill the current, empty folder.

    Args:
        folder: The current folder.
    """
    write_documents(folder / "text.jsonl", 24)
    (folder / "my.toml").write_text(MODEL + REST)
    for words in (
        ["tokenize", "text.jsonl", "data/text", "--vocab-size", "400", "--workers", "1"],
        ["train", "my.toml", "log.peak_tflops=1"],
        ["convert", "export", "runs/short", "llama"],
        ["convert", "import", "llama", "models/llama"],
    ):
        assert main(words) == 0
    (folder / "own.toml").write_text('[model]\nfrom = "models/llama"\n' + REST)
    (folder / "broken.toml").write_text("[model\nvocab_size = 1\n")
    (folder / "broken.jsonl").write_text('{"text": "one"}\n{"text": "two\n')
    (folder / "empty").mkdir()
    (folder / "gguf").mkdir()
    (folder / "gguf" / "model-q8.gguf").write_bytes(b"GGUF")
    _damage(folder)
    _make_foreign(folder)


def _damage(folder: Path) -> None:
    """Copy the run, and change one bit of a weight."""
    copy = Path(shutil.copytree(folder / "runs/short", folder / "runs/damaged"))
    file = max(copy.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def _make_foreign(folder: Path) -> None:
    """Copy the Hugging Face folder as a model of another kind."""
    copy = Path(shutil.copytree(folder / "llama", folder / "other"))
    table = json.loads((copy / "config.json").read_text())
    table["hidden_act"] = "gelu"
    (copy / "config.json").write_text(json.dumps(table))
