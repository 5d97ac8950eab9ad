"""`lcdist extend --model`: import a Hugging Face model, extend it, export it, read it again."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lcdist.commands import extend_steps
from lcdist.commands.main import main
from lcdist.config import load
from lcdist.config.rope import RopePI
from lcdist.convert.huggingface.fit_config import fit_config, open_user_model
from lcdist.report.sections import report_facts
from tests.convert.lora_runs import TEXT, logits, weights_at
from tests.distributed import run_ranks
from tests.launch.conftest import ROOT, TINY, Start, run_here, write_documents
from tests.tolerance import assert_matches


def perplexity_of_export(job: Path) -> list[float]:
    """Import the exported folder again, and return its perplexity by length."""
    again, found = job / "again", job / "again.json"
    assert main(["convert", "import", str(job / "exported"), str(again)]) == 0
    told = json.loads((job / "evaluation.json").read_text())
    settings = [f"evaluate.lengths={told['lengths']}", f"evaluate.tokens={told['tokens']}"]
    settings.append(f"data.path={job / 'data'}")
    assert main(["evaluate", str(again), "--output", str(found), *settings]) == 0
    return json.loads(found.read_text())["perplexity"]


def load_with_transformers(folder: Path, **options: bool) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.mark.exhaustive
def test_extend_on_two_ranks_lowers_perplexity_and_exports(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    """SCCA, position interpolation and LoRA: extend, merge, export, load with transformers."""
    words = ["--model", str(llama), "--data", str(text), "--name", "job", "--configs", str(TINY)]
    words += ["--method", "scca", "--lora", "4", "log.peak_tflops=1", "train.steps=12"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "extend.py"), *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    job = tmp_path / "runs/job"
    facts = report_facts(job)
    headline, [stage] = facts["headline"], facts["stages"]
    assert headline["length"] == 256 and headline["after"] < headline["before"]
    assert f"{headline['before']:.2f} before, {headline['after']:.2f} after" in done.stdout
    assert stage["plan"]["world"].startswith("2 = dp 1 x pp 1 x cp 2")
    assert "LoRA of rank 4 on q, k, v, o, embeddings, norms" in stage["plan"]["trained"]

    page = (job / "report.html").read_text()
    assert "LoRA of rank 4 on q, k, v, o, merged at the end; embeddings and norms whole" in page
    assert "tiny-llama as it came, made for 64 tokens" in page
    assert "none, base 10000 \N{RIGHTWARDS ARROW} pi, base 10000, factor 4" in page
    for value in (headline["before"], headline["after"]):
        assert f"<b>{value:.3g}</b>" in page

    table = json.loads((job / "exported/config.json").read_text())
    assert table["max_position_embeddings"] == 256 and table["model_type"] == "llama"
    assert table["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 4.0}
    with_adapters, before = run_ranks(logits, 1, [job / "extend", job / "model"], [])[0]
    with torch.no_grad():
        merged = load_with_transformers(job / "exported")(TEXT[None], use_cache=False).logits[
            0, :, :250
        ]
        original = load_with_transformers(llama)(TEXT[None], use_cache=False).logits[0, :, :250]
    assert_matches(merged, with_adapters, 1e-5)
    assert_matches(original, before, 1e-5)
    assert (merged - original).abs().max() > 0.1
    assert not (job / "merged").exists()
    assert perplexity_of_export(job) == pytest.approx(facts["evaluation"]["after"], rel=1e-5)


@pytest.mark.exhaustive
def test_extend_chooses_length_and_steps_for_a_model_of_512_tokens(tmp_path: Path) -> None:
    """The quickstart's model in small: four times its length, and better at it, within minutes."""
    data, run, model = (tmp_path / name for name in ("data", "run", "model"))
    text = write_documents(tmp_path / "text.jsonl", 120)
    long = ["train.seqlen=512", "train.steps=150", "train.global_batch_size=2", "log.peak_tflops=1"]
    for words in (
        ["tokenize", str(text), str(data), "--vocab-size", "400", "--workers", "1"],
        ["train", str(TINY / "pretrain.toml"), f"data.path={data}", f"log.folder={run}", *long],
        ["convert", "export", str(run), str(model)],
    ):
        assert main(words) == 0
    words = ["--model", str(model), "--data", str(text), "--name", "job", "--minutes", "0.4"]
    words += ["--configs", str(TINY), "evaluate.tokens=4096", "train.global_batch_size=1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "extend.py"), *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2,048 tokens, 4 times the model's own 512" in done.stdout
    job = tmp_path / "runs/job"
    headline = report_facts(job)["headline"]
    assert headline["length"] == 2048 and headline["after"] < headline["before"]
    choice = json.loads((job / "job.json").read_text())["choice"]
    assert 5 <= choice["steps"] == load(job / "extend.toml").train.steps
    assert choice["steps"] * choice["step_seconds"] + choice["evaluation_seconds"] <= 24


# `landmark` is the only method that adds a row to the vocabulary.
OTHERS = [pytest.param(m, marks=pytest.mark.exhaustive) for m in ("coca", "lssar", "tensorized")]


@pytest.mark.parametrize("method", ["landmark", *OTHERS])
def test_extend_works_with_every_method(
    start: Start, modules_cache: Path, tmp_path: Path, method: str
) -> None:
    assert start("--method", method) == 0
    job = tmp_path / "runs/job"
    facts = report_facts(job)
    assert facts["headline"]["length"] == 256 and facts["stages"][0]["steps"] == 2
    assert 1 < facts["headline"]["before"] < 400 and 1 < facts["headline"]["after"] < 400
    assert method in (job / "report.html").read_text()
    assert perplexity_of_export(job) == pytest.approx(facts["evaluation"]["after"], rel=1e-5)
    model = load_with_transformers(job / "exported", trust_remote_code=True)
    with torch.no_grad():
        found = model(TEXT[None]).logits
    assert found.shape[:2] == (1, len(TEXT)) and found[..., :400].isfinite().all()
    assert (job / "grown").exists() == (method == "landmark")
    # The export can be extended again with its own method only, without another landmark row.
    hf, on = open_user_model(job / "exported"), ["train.seqlen=512"]
    with pytest.raises(ValueError, match=f"extend it with METHOD={method}"):
        fit_config(load(TINY / "extend.toml", on), hf, [], 1)
    again = load(TINY / "extend.toml", [*on, f"attention.method={method}"])
    further = replace(hf.model, rope=RopePI(factor=8.0))
    assert fit_config(again, hf, [], 1).model == further


def test_extend_runs_each_stage_once_and_resumes_an_interrupted_one(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    job, seen = tmp_path / "runs/job", list[str]()

    def call(words: Sequence[str], broken: str) -> None:
        kind = next((w for w in ("tokenize", "evaluate", "probe") if w in words), "train")
        if kind == broken:
            raise subprocess.CalledProcessError(1, list(words))
        seen.append(kind)
        run_here(words, {})

    monkeypatch.setattr(extend_steps, "run_program", lambda words, _: call(words, "evaluate"))
    assert start() == 1 and seen == ["probe", "tokenize", "train"]
    assert not (job / "report.html").exists()
    # State after a kill between the rename of the import's folder and its entry in the table.
    told = json.loads((job / "conversion.json").read_text())
    (job / "conversion.json").unlink()
    monkeypatch.setattr(extend_steps, "run_program", lambda words, _: call(words, ""))
    assert start() == 0 and seen == ["probe", "tokenize", "train", "evaluate"]
    assert json.loads((job / "conversion.json").read_text())["model"] == told["model"]
    shown = (job / "report.html").read_text()
    assert told["model"] in shown and "Where it came from and went to" in shown
    capsys.readouterr()
    assert start() == 0 and len(seen) == 4
    assert "all was done before" in capsys.readouterr().out
    assert (job / "report.html").read_text() == shown
    assert start("train.seqlen=128") == 2
    assert "holds a job with other settings" in capsys.readouterr().err


def test_convert_adapter_merge_and_unmerge(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Export, merge and unmerge the adapters of an extended run."""
    assert start("--lora", "2", "lora.embeddings=false", "lora.norms=false") == 0
    job = tmp_path / "runs/job"
    run = str(job / "extend")
    adapter, merged, base = (str(tmp_path / name) for name in ("adapter", "merged", "base"))
    capsys.readouterr()
    for words in (
        ["adapter", run, adapter],
        ["merge", run, merged],
        ["unmerge", merged, run, base],
    ):
        assert main(["convert", *words]) == 0
        assert f"wrote {words[-1]}" in capsys.readouterr().out
    peft = json.loads((Path(adapter) / "adapter_config.json").read_text())
    assert (peft["peft_type"], peft["r"], peft["lora_alpha"]) == ("LORA", 2, 4)
    with_adapters, without = run_ranks(logits, 1, [job / "extend", Path(merged)], [])[0]
    assert_matches(without, with_adapters, 1e-5)
    before, again, changed = (weights_at(Path(p)) for p in (job / "model", base, merged))
    key = "decoder.layers.1.self_attention.linear_qkv.weight"
    assert_matches(again[key], before[key], 1e-6)
    assert (changed[key] - before[key]).abs().max() > 1e-5
    assert main(["convert", "merge", str(job / "model"), str(tmp_path / "no")]) == 2
    assert "has no LoRA adapters" in capsys.readouterr().err
