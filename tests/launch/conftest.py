"""Fixtures: a tiny LLaMA in Hugging Face's format, and `lcdist extend` run on it in process."""

import json
import random
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from lcdist.commands import extend, extend_steps
from lcdist.commands.main import main

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "launch" / "tiny"
Start = Callable[..., int]


def write_documents(file: Path, count: int) -> Path:
    """Write documents of four kilobytes in which names repeat at long distances."""
    words = random.Random(0)
    names = ["".join(words.choices("abcdefghij", k=5)) for _ in range(60)]
    rows = []
    for number in range(count):
        lines = [f"{a} = {words.choice(names)}({number})" for a in words.choices(names, k=220)]
        rows.append(json.dumps({"text": "\n".join(lines)}))
    file.write_text("\n".join(rows))
    return file


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a hundred kilobytes of text."""
    return write_documents(tmp_path_factory.mktemp("text") / "part.jsonl", 24)


@pytest.fixture(scope="session")
def llama(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tiny LLaMA at 64 tokens, and return it as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("llama")
    data, run, out = folder / "data", folder / "run", folder / "tiny-llama"
    own = [f"data.path={data}", f"log.folder={run}", "log.peak_tflops=1", "checkpoint.every=0"]
    for words in (
        ["tokenize", str(text), str(data), "--vocab-size", "400", "--workers", "1"],
        ["train", str(TINY / "pretrain.toml"), "model.nheads_kv=1", *own, "train.steps=20"],
        ["convert", "export", str(run), str(out)],
    ):
        assert main(words) == 0
    assert (out / "tokenizer.model").is_file()
    return out


def run_here(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run what `lcdist extend` would start, in this process and a world of one."""
    if "lcdist" in words:
        asked = list(words[words.index("lcdist") + 1 :])
    else:
        asked = ["train", *words[words.index(str(ROOT / "launch/train.py")) + 1 :]]
    if asked[0] == "tokenize":
        asked += ["--workers", "1"]
    status = main(asked)
    if status:
        raise subprocess.CalledProcessError(status, list(words))


@pytest.fixture
def start(
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Start:
    """Run `lcdist extend --model` in this process for two steps; return its exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extend_steps, "run_program", run_here)
    monkeypatch.setattr(extend, "_ranks", lambda: 1)

    def run(*words: str, model: Path | None = None) -> int:
        source = model or request.getfixturevalue("llama")
        given = ["--model", str(source), "--data", str(text), "--configs", str(TINY)]
        short = ["train.steps=2", "evaluate.tokens=512", "log.peak_tflops=1"]
        return main(["extend", *given, "--name", "job", *short, *words])

    return run
