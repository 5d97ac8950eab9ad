"""Exports with custom attention run in transformers with the code they carry."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Words
from tokenizers import models
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lcdist.convert.huggingface.custom_attention import NEEDS_CODE
from tests.convert.hf import export_all, import_all
from tests.convert.own_runs import (
    DEFAULT,
    EXHAUSTIVE,
    LENGTHS,
    NEW,
    NOT_GENERATED,
    PROMPT,
    VOCAB,
    run_all,
    text,
)
from tests.distributed import run_ranks
from tests.tolerance import assert_as_good_as_eager, assert_matches

FP32 = [name for name in DEFAULT if name != "half"]
# One case per method.
KINDS = ["slack", "lssar", "fold", "marks-units", "mixed"]


@pytest.fixture(scope="module")
def exported(
    modules_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Return the folder of exports and our model's answers, by case."""
    return train_and_export(tmp_path_factory.mktemp("runs"), DEFAULT)


def train_and_export(folder: Path, names: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    answers = run_ranks(run_all, 2, folder, names, timeout=200)[0]
    run_ranks(export_all, 1, [(folder / name, folder / "hf" / name, 60_000) for name in names])
    return folder / "hf", answers


def load(folder: Path, **words: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **words).eval()


@torch.no_grad()
def logits_of(model: Any, x: Tensor, **words: Any) -> Tensor:
    return model(input_ids=x, **words).logits


def without_landmark(logits: Tensor, model: Any) -> Tensor:
    """Return logits without the landmark's."""
    return logits[..., :-1] if model.model.text_in_block else logits


@pytest.mark.parametrize("case", FP32)
def test_transformers_logits_match_ours(case: str, exported: tuple[Path, Any]) -> None:
    """Cover one token, and texts below and beyond the original length of the rotary scaling."""
    check_logits(case, *exported)


def check_logits(case: str, folder: Path, answers: dict[str, Any]) -> None:
    model = load(folder / case)
    for count, ours in zip(LENGTHS, answers[case][0], strict=True):
        theirs = logits_of(model, text(count))
        assert theirs.shape == (2, count, VOCAB) and theirs.dtype == torch.float32
        assert_matches(without_landmark(theirs, model), without_landmark(ours, model), 1e-5)
        assert not case.startswith("marks") or (theirs[..., -1] == -torch.inf).all()


@pytest.mark.parametrize("case", [name for name in DEFAULT if name not in NOT_GENERATED])
def test_greedy_generation_matches_ours(case: str, exported: tuple[Path, Any]) -> None:
    """Include a rotation that changes while tokens are generated, and selection units."""
    check_generation(case, *exported)


def check_generation(case: str, folder: Path, answers: dict[str, Any]) -> None:
    generated = load(folder / case).generate(text(PROMPT)[:1], max_new_tokens=NEW, do_sample=False)
    assert generated[0].tolist() == answers[case][1].tolist()
    assert len(generated[0]) == PROMPT + NEW


@pytest.mark.exhaustive
def test_other_variants_match_ours(
    modules_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, answers = train_and_export(tmp_path_factory.mktemp("variants"), EXHAUSTIVE)
    for case in EXHAUSTIVE:
        check_logits(case, folder, answers)
        if case not in NOT_GENERATED:
            check_generation(case, folder, answers)


@pytest.mark.parametrize("case", KINDS)
def test_padding_changes_nothing(case: str, exported: tuple[Path, Any]) -> None:
    """Compare logits, loss and generated tokens with padding on either side."""
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
        kept = without_landmark(out.logits[row : row + 1, start:stop], model)
        assert_matches(kept, without_landmark(alone.logits, model), 1e-6)
        logits = without_landmark(alone.logits, model)[0, :-1]
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
        without_landmark(logits_of(model, x, logits_to_keep=2), model),
        without_landmark(whole[:, -2:], model),
        1e-6,
    )
    model(input_ids=x, labels=x).loss.backward()
    without = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert not without


def test_unsupported_arguments_are_rejected(
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


def test_bf16_model_is_loaded_in_bf16(exported: tuple[Path, Any]) -> None:
    """Require an error to fp32 no larger than ours, by the rule for kernels."""
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


@pytest.mark.exhaustive
def test_export_runs_without_lcdist(exported: tuple[Path, Any], tmp_path: Path) -> None:
    """Use a separate process in which lcdist, its kernels and Megatron cannot be imported."""
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
def test_model_saved_by_transformers_is_loaded_again(
    case: str, exported: tuple[Path, Any], tmp_path: Path
) -> None:
    """Load it with transformers, code included, and import it."""
    model = load(exported[0] / case)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(logits_of(again, text(11)), logits_of(model, text(11)))
    run_ranks(import_all, 1, [(tmp_path / "saved", tmp_path / "ours", ())])


def with_tokenizer(source: Path, folder: Path) -> Path:
    """Copy an export, and give it a tokenizer of two words."""
    shutil.copytree(source, folder)
    words = models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    Words(words).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


@pytest.mark.parametrize("case", ["mixed-marks", "slack"])
def test_only_the_model_needs_its_code(
    case: str,
    exported: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Nobody is asked, and nothing takes the model for a plain LLaMA, saved again or not."""

    def asked(text: str = "") -> str:
        raise AssertionError(f"asked: {text}")

    monkeypatch.setattr("builtins.input", asked)
    folder = with_tokenizer(exported[0] / case, tmp_path / "first")
    load(folder).save_pretrained(tmp_path / "second")
    capfd.readouterr()
    assert AutoTokenizer.from_pretrained(folder)("b")["input_ids"] == [1]
    assert capfd.readouterr() == ("", "")
    for each in (folder, tmp_path / "second"):
        for plain in (AutoModelForCausalLM, AutoModel, LlamaForCausalLM):
            with pytest.raises(KeyError, match="load this model with trust_remote_code=True"):
                plain.from_pretrained(each, attn_implementation="eager")
        table = json.loads((each / "config.json").read_text())
        assert table["rope_scaling"]["type"] == table["hidden_act"] == NEEDS_CODE


def test_config_lists_the_attention_of_every_layer(exported: tuple[Path, Any]) -> None:
    table = json.loads((exported[0] / "mixed" / "config.json").read_text())
    assert table["model_type"] == "llama" and table["architectures"] == ["LcdistForCausalLM"]
    block = table["lcdist"]
    methods = [layer["method"] for layer in block["attention"]]
    assert methods == ["coca", "tensorized", "lssar", "full"]
    assert block["attention"][1]["modes"] == [4] and block["attention"][2]["power"] == 15.0
    assert block["layers"] == "coca@0 tensorized@1 scca@3"
    for name in table["auto_map"].values():
        assert (exported[0] / "mixed" / f"{name.split('.')[0]}.py").is_file()
