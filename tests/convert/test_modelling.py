"""Models that a plain LLaMA does not compute run in transformers by the code that goes along."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.convert.hf import export_all, import_all
from tests.convert.own_runs import CASES, LENGTHS, NEW, PROMPT, SILENT, VOCAB, run_all, text
from tests.distributed import run_ranks
from tests.tolerance import assert_as_good_as_eager, assert_matches

FP32 = [name for name in CASES if name != "half"]
# Of each kind one: whose rows and kinds of answers the tests below look at.
KINDS = ["slack", "lssar", "fold", "marks-units", "mixed"]


@pytest.fixture(scope="module")
def exported(
    modules_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The folder of the exports, one a case, and what our model says, by case."""
    folder = tmp_path_factory.mktemp("runs")
    answers = run_ranks(run_all, 2, folder, timeout=200)[0]
    run_ranks(export_all, 1, [(folder / name, folder / "hf" / name, 60_000) for name in CASES])
    return folder / "hf", answers


def load(folder: Path, **words: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **words).eval()


@torch.no_grad()
def logits_of(model: Any, x: Tensor, **words: Any) -> Tensor:
    return model(input_ids=x, **words).logits


def speakable(logits: Tensor, model: Any) -> Tensor:
    """Logits of tokens that can be said: without that of the landmark."""
    return logits[..., :-1] if model.model.text_in_block else logits


@pytest.mark.parametrize("case", FP32)
def test_transformers_computes_our_logits(case: str, exported: tuple[Path, Any]) -> None:
    """A single token, and texts below and beyond the original length of every rotation."""
    folder, answers = exported
    model = load(folder / case)
    for count, ours in zip(LENGTHS, answers[case][0], strict=True):
        theirs = logits_of(model, text(count))
        assert theirs.shape == (2, count, VOCAB) and theirs.dtype == torch.float32
        assert_matches(speakable(theirs, model), speakable(ours, model), 1e-5)
        assert not case.startswith("marks") or (theirs[..., -1] == -torch.inf).all()


@pytest.mark.parametrize("case", [name for name in CASES if name not in SILENT])
def test_it_says_what_our_model_says(case: str, exported: tuple[Path, Any]) -> None:
    """Greedy, also where rotation changes while it speaks, and where selection has units."""
    folder, answers = exported
    said = load(folder / case).generate(text(PROMPT)[:1], max_new_tokens=NEW, do_sample=False)
    assert said[0].tolist() == answers[case][1].tolist()
    assert len(said[0]) == PROMPT + NEW


@pytest.mark.parametrize("case", KINDS)
def test_a_padded_row_is_what_it_is_alone(case: str, exported: tuple[Path, Any]) -> None:
    """Logits, loss and what is generated, whichever side the padding is on."""
    model = load(exported[0] / case)
    x, mask = text(23).repeat(2, 1), torch.ones(4, 23, dtype=torch.long)
    spans = [(0, 23), (4, 23), (0, 18), (3, 21)]
    for row, (start, stop) in enumerate(spans):
        mask[row, :start] = mask[row, stop:] = 0
    labels = x.masked_fill(mask == 0, -100)
    with torch.no_grad():
        out = model(input_ids=x, attention_mask=mask, labels=labels)
    total = 0.0
    for row, (start, stop) in enumerate(spans):
        one = x[row : row + 1, start:stop]
        with torch.no_grad():
            alone = model(input_ids=one, labels=one)
        kept = speakable(out.logits[row : row + 1, start:stop], model)
        assert_matches(kept, speakable(alone.logits, model), 1e-6)
        logits = speakable(alone.logits, model)[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, one[0, 1:])
        assert_matches(alone.loss, loss, 1e-6)
        total += float(alone.loss) * (stop - start - 1)
    count = sum(stop - start - 1 for start, stop in spans)
    assert float(out.loss) == pytest.approx(total / count, rel=1e-5)

    left = torch.ones(2, 9, dtype=torch.long)
    left[0, :4] = 0
    words: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    both = model.generate(text(9), attention_mask=left, **words)
    alone = model.generate(text(9)[:1, 4:], **words)
    assert both[0, 4:].tolist() == alone[0].tolist()


@pytest.mark.parametrize("case", ["marks-units", "fold-wide"])
def test_embeddings_last_logits_and_gradients(case: str, exported: tuple[Path, Any]) -> None:
    model = load(exported[0] / case)
    x = text(21)
    whole = logits_of(model, x)
    embedded = model.get_input_embeddings()(x)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embedded).logits, whole)
    assert_matches(
        speakable(logits_of(model, x, logits_to_keep=2), model),
        speakable(whole[:, -2:], model),
        1e-6,
    )
    model(input_ids=x, labels=x).loss.backward()
    without = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert not without


def test_what_it_cannot_do_is_refused(
    exported: tuple[Path, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = load(exported[0] / "slack")
    x = text(5)
    for words, said in (
        ({"position_ids": torch.arange(5)[None]}, "position_ids is given: positions follow"),
        ({"past_key_values": ()}, "past_key_values is given"),
        ({"output_attentions": True}, "output_attentions is given"),
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, "attention_mask of shape"),
        ({"labels": x, "logits_to_keep": 1}, "labels need all logits"),
    ):
        with pytest.raises(ValueError, match=said):
            model(input_ids=x, **words)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    first = model.generate(x, max_new_tokens=2, do_sample=False, use_cache=True)
    second = model.generate(x, max_new_tokens=2, do_sample=False)
    assert torch.equal(first, second)
    assert caplog.text.count("this model has no cache") == 1
    with pytest.raises(ValueError, match="lists attention for 0 of 32 layers"):
        type(model)(type(model.config)())


def test_a_model_in_bf16_is_loaded_as_it_is(exported: tuple[Path, Any]) -> None:
    """And is no further from the same weights in fp32 than ours is, by the rule for kernels."""
    folder, answers = exported
    model = load(folder / "half", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    x, ours = text(LENGTHS[-1]), answers["half"][0][-1]
    truth = logits_of(load(folder / "half", dtype=torch.float32), x)
    assert_as_good_as_eager(logits_of(model, x).float(), ours.float(), truth)


ALONE = """
import importlib.abc, json, sys
class Nothing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lcdist", "lcdist_kernels", "megatron"):
            raise ImportError(name + " is not here")
sys.meta_path.insert(0, Nothing())
import torch
from transformers import AutoModelForCausalLM
x, found = torch.load(sys.argv[1]), {}
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        found[folder] = model(input_ids=x).logits
torch.save(found, sys.argv[2])
assert "lcdist" not in sys.modules
"""


def test_it_runs_where_lcdist_is_not(exported: tuple[Path, Any], tmp_path: Path) -> None:
    """In a process of its own that refuses to import lcdist, its kernels and Megatron."""
    folder, answers = exported
    torch.save(text(LENGTHS[-1]), tmp_path / "x.pt")
    folders = [str(folder / case) for case in KINDS]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    words = [sys.executable, "-c", ALONE, str(tmp_path / "x.pt"), str(tmp_path / "y.pt"), *folders]
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    for case, theirs in zip(KINDS, torch.load(tmp_path / "y.pt").values(), strict=True):
        ours = answers[case][0][-1]
        last = VOCAB - case.startswith("marks")
        assert_matches(theirs[..., :last], ours[..., :last], 1e-5)


@pytest.mark.parametrize("case", ["mixed-marks", "lssa"])
def test_what_transformers_saves_is_read_again(
    case: str, exported: tuple[Path, Any], tmp_path: Path
) -> None:
    """By itself, code and all, and by an import."""
    model = load(exported[0] / case)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(logits_of(again, text(11)), logits_of(model, text(11)))
    run_ranks(import_all, 1, [(tmp_path / "saved", tmp_path / "ours", ())])


def test_it_says_how_every_layer_attends(exported: tuple[Path, Any]) -> None:
    table = json.loads((exported[0] / "mixed" / "config.json").read_text())
    assert table["model_type"] == "lcdist" and table["architectures"] == ["LcdistForCausalLM"]
    block = table["lcdist"]
    methods = [layer["method"] for layer in block["attention"]]
    assert methods == ["coca", "tensorized", "lssar", "full"]
    assert block["attention"][1]["modes"] == [4] and block["attention"][2]["power"] == 15.0
    assert block["layers"] == "coca@0 tensorized@1 scca@3"
    for name in table["auto_map"].values():
        assert (exported[0] / "mixed" / f"{name.split('.')[0]}.py").is_file()
