"""lcdist and transformers agree on SmolLM2-135M, from the import to the export."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from lcdist.commands.main import main
from lcdist.data.datasets.split import TokenSplit
from lcdist.evaluate.text import Windows, held_out_text
from tests.smollm2.conftest import install_into
from tests.tolerance import assert_matches

pytestmark = pytest.mark.exhaustive

LENGTHS, TOKENS = (256, 1024), 2048
PROMPT = "The capital of France is"
CONFIG = """
[model]
from = "{folder}/model"

[lora]
rank = 8
embeddings = false

[data]
path = "{folder}/data"

[train]
seqlen = 2048
steps = 2
global_batch_size = 1

[optim]
lr = 1e-3

[log]
folder = "{folder}/run"
tensorboard = false
peak_tflops = 0.1
"""
# lm-evaluation-harness and what it needs stand behind the packages of this environment.
HARNESS = """
import json, sys
sys.path.append(sys.argv[1])
import lm_eval
from lm_eval.tasks import TaskManager
found = lm_eval.simple_evaluate(
    model="hf",
    model_args={"pretrained": sys.argv[2], "dtype": "float32"},
    tasks=["lcdist_local"],
    task_manager=TaskManager(include_path=sys.argv[3], include_defaults=False),
    device="cpu",
    batch_size=1,
    log_samples=True,
)
samples = found["samples"]["lcdist_local"]
samples = sorted(samples, key=lambda sample: sample["doc_id"])
print(json.dumps([[score for score, _ in sample["filtered_resps"]] for sample in samples]))
"""
TASK = """
task: lcdist_local
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
QUESTIONS = (
    {"question": PROMPT, "choices": [" Paris", " London", " a fish"], "answer": 0},
    {"question": "Two plus two is", "choices": [" four", " purple"], "answer": 0},
)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens[None]).logits[0]


def test_perplexities_are_those_of_transformers(work: Path, smollm2: Path) -> None:
    lengths = f"evaluate.lengths=[{','.join(map(str, LENGTHS))}]"
    out = work / "perplexity.json"
    words = ["evaluate", str(work / "model"), lengths, f"evaluate.tokens={TOKENS}"]
    assert main([*words, f"data.path={work / 'data'}", "--output", str(out)]) == 0
    found = json.loads(out.read_text())
    model = load(smollm2)
    text = held_out_text(TokenSplit(work / "data", "valid"), LENGTHS[-1], TOKENS)
    for length, perplexity, scored in zip(
        LENGTHS, found["perplexity"], found["scored"], strict=True
    ):
        windows, total, count = Windows(text, length, 49152), 0.0, 0
        for number in range(windows.count):
            sample = windows.sample(number)
            assert sample.is_target is not None
            logits = logits_of(model, sample.tokens[:-1])
            losses = cross_entropy(logits, sample.tokens[1:], reduction="none")
            keep = sample.is_target[1:]
            total, count = total + losses[keep].sum().item(), count + int(keep.sum())
        assert count == scored
        assert torch.tensor(total / count).exp().item() == pytest.approx(perplexity, rel=1e-4)


def test_greedy_generation_is_that_of_transformers(work: Path, smollm2: Path) -> None:
    out = work / "greedy.txt"
    words = ["generate", str(work / "model"), "--prompt", PROMPT, "--temperature", "0"]
    words += ["--max-new-tokens", "24", "--output", str(out), f"data.path={work / 'data'}"]
    assert main(words) == 0
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    theirs = load(smollm2).generate(prompt, max_new_tokens=24, do_sample=False)
    assert out.read_text() == tokenizer.decode(theirs[0], skip_special_tokens=True) + "\n"


@pytest.fixture(scope="module")
def exported(work: Path) -> Path:
    """Train adapters for two steps at 2,048 tokens, merge and export them."""
    (work / "lora.toml").write_text(CONFIG.format(folder=work))
    for words in (
        ["train", str(work / "lora.toml")],
        ["convert", "adapter", str(work / "run"), str(work / "adapter")],
        ["convert", "merge", str(work / "run"), str(work / "merged")],
        ["convert", "export", str(work / "merged"), str(work / "exported")],
    ):
        assert main(words) == 0
    return work / "exported"


def test_adapters_and_export_load_elsewhere(work: Path, smollm2: Path, exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids[0]
    before, after = logits_of(load(smollm2), tokens), logits_of(load(exported), tokens)
    assert (after - before).norm() > 1e-3 * before.norm()
    adapter = json.loads((work / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(smollm2)
    peft = PeftModel.from_pretrained(load(smollm2), work / "adapter").eval()
    assert_matches(logits_of(peft, tokens), after, 1e-4)


def test_extend_answers_with_its_estimate(
    smollm2: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two cores take minutes a step: it spends nothing, and says what would."""
    monkeypatch.chdir(tmp_path)
    assert main(["extend", "--model", str(smollm2), "--data", str(text), "--minutes", "0.1"]) == 2
    shown = capsys.readouterr()
    assert "32,768" in shown.out and "On another machine" in shown.out
    assert "nothing was done, as nothing fits" in shown.err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_harness_scores_what_transformers_scores(
    exported: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    assert request.config.cache is not None
    packages = request.config.cache.mkdir("lm-eval") / "packages"
    install_into(packages, "lm-eval")
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    (tmp_path / "task.yaml").write_text(TASK.replace("FILE", str(data)))
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, str(packages), str(exported), str(tmp_path)],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    model, tokenizer = load(exported), AutoTokenizer.from_pretrained(exported)
    for question, scores in zip(QUESTIONS, found, strict=True):
        for choice, score in zip(question["choices"], scores, strict=True):
            begin = len(tokenizer(question["question"]).input_ids)
            tokens = torch.tensor(tokenizer(question["question"] + choice).input_ids)
            logits = logits_of(model, tokens)[begin - 1 : -1]
            expected = -cross_entropy(logits, tokens[begin:], reduction="sum").item()
            assert score == pytest.approx(expected, rel=1e-4)
