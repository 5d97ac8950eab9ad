"""lm-evaluation-harness asks a checkpoint as it is: answers are those of plain forward passes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist.data.tokenizers.byte_tokenizer import ByteTokenizer
from lcdist.model.build import CausalLM
from tests.distributed import run_ranks
from tests.evaluate.worlds import plain_losses, text_logits, trained_model, write_tokens
from tests.smollm2.conftest import install_into

pytestmark = pytest.mark.exhaustive

ROOT = Path(__file__).parents[2]
# lm-evaluation-harness and what it needs stand behind the packages of this environment.
PROGRAM = """
import json, sys
sys.path.append(sys.argv[1])
import lm_eval
from lm_eval.tasks import TaskManager
from lcdist.distributed.mesh import end_world
from lcdist.evaluate.harness import CheckpointLM
found = lm_eval.simple_evaluate(
    model=CheckpointLM(sys.argv[2], max_length=48),
    tasks=["choices", "texts", "answers"],
    task_manager=TaskManager(include_path=sys.argv[3], include_defaults=False),
    bootstrap_iters=0,
    log_samples=True,
)
end_world()
# The harness itself returns nothing on other ranks.
if found is not None:
    answers = {
        task: [s["filtered_resps"] for s in sorted(samples, key=lambda s: s["doc_id"])]
        for task, samples in found["samples"].items()
    }
    print("FOUND" + json.dumps(answers))
"""
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
target_delimiter: ""
doc_to_text: "{{question}}"
"""
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
    "answers": """
output_type: generate_until
doc_to_target: "{{text}}"
generation_kwargs: {until: [never, UNTIL], do_sample: false, max_gen_toks: 9}
metric_list: [{metric: exact_match}]
""",
}
QUESTIONS: tuple[dict[str, Any], ...] = (
    {"question": "Two plus two", "choices": [" is four", " is"], "answer": 0, "text": "a b c" * 30},
    {"question": "x" * 70, "choices": ["y", " purple"], "answer": 1, "text": "short"},
)


def encoded(text: str) -> Tensor:
    return torch.tensor(list(text.encode()))


def expected_answers(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    model = trained_model(folder, "model.vocab_size=258", "model.init_std=0.2")
    found: dict[str, Any] = {"choices": [], "texts": [], "answers": []}
    for each in QUESTIONS:
        question = encoded(str(each["question"]))
        scores = []
        for choice in each["choices"]:
            whole = torch.cat([question, encoded(choice)])[-49:]
            scores.append(-plain_losses(model, whole)[-len(choice) :].sum().item())
        found["choices"].append(scores)
        found["texts"].append(rolling(model, encoded(str(each["text"]))))
        prompt = question[-(48 - 9) :]
        for _ in range(9):
            with torch.no_grad():
                best = text_logits(model, prompt)[-1].argmax()
            if best == ByteTokenizer.eos_id:
                break
            prompt = torch.cat([prompt, best[None]])
        text = ByteTokenizer().decode(prompt[len(question[-39:]) :].tolist())
        found["answers"].append(text)
    return found


def rolling(model: CausalLM, text: Tensor) -> float:
    """Return the log-likelihood in windows of 48 tokens; the last one has full context."""
    whole = torch.cat([torch.tensor([ByteTokenizer.eos_id]), text])
    total, done = 0.0, 0
    while done < len(text):
        end = min(done + 48, len(text))
        begin = max(0, end - 48) if done else 0
        total -= plain_losses(model, whole[begin : end + 1])[done - begin :].sum().item()
        done = end
    return total


def test_answers_are_those_of_plain_passes(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    assert request.config.cache is not None
    packages = request.config.cache.mkdir("lm-eval") / "packages"
    install_into(packages, "lm-eval")
    text = list(("Two plus two is four. " * 20).encode())
    splits = {"train": [text], "valid": [text]}
    folder = write_tokens(tmp_path / "data", splits, vocab_size=258).parent
    for name, content in ByteTokenizer().files.items():
        (folder / "data" / name).write_bytes(content)
    [expected] = run_ranks(expected_answers, 1, folder)
    # A text within the first answer ends it.
    until = expected["answers"][0][3:5]
    assert len(until) == 2
    expected["answers"] = [answer.split(until)[0] for answer in expected["answers"]]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    for name, task in TASKS.items():
        content = f"task: {name}\n{COMMON.replace('FILE', str(data))}{task}".replace(
            "UNTIL", json.dumps(until)
        )
        if name == "texts":
            content = content.replace('doc_to_text: "{{question}}"\n', "")
        (tmp_path / "tasks" / f"{name}.yaml").write_text(content)
    (tmp_path / "ask.py").write_text(PROGRAM)
    words = [str(tmp_path / "ask.py"), str(packages), str(folder), str(tmp_path / "tasks")]
    for launcher in ([], [str(ROOT / "launch/run.py"), "--nproc-per-node", "2"]):
        done = subprocess.run(
            [sys.executable, *launcher, *words],
            env={
                **{"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)},
                **{"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        line = next(line for line in done.stdout.splitlines() if "FOUND" in line)
        found = json.loads(line.partition("FOUND")[2])
        for scores, answers in zip(expected["choices"], found["choices"], strict=True):
            assert [score for score, _ in answers] == pytest.approx(scores, rel=1e-4)
        assert [text for [text] in found["texts"]] == pytest.approx(expected["texts"], rel=1e-4)
        assert [answer for [answer] in found["answers"]] == expected["answers"]
