"""Adapters match PEFT: loss, gradients, folders in both directions, merged weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcdist.checkpoint.read import CheckpointError
from lcdist.convert.lora.adapter import check_adapter, export_adapter
from lcdist.convert.lora.merge import unmerge
from lcdist.train.resume import open_fitting
from lcdist.utils.digests import SUMS
from tests.convert.lora_hf import factors, llama, peft_llama
from tests.convert.lora_runs import (
    TEXT,
    bare,
    batches,
    logits,
    merged,
    merged_and_back,
    read_without,
    resumed,
    save_base,
    started,
    trained,
    weights_at,
)
from tests.distributed import run_ranks
from tests.model.lora_cases import CP, LORA, PP, SP, TP, WHOLE
from tests.model.small import small
from tests.tolerance import assert_matches

TIED = "model.tied_embeddings=true"
KINDS = {
    "whole": (4, (TP, CP, SP), (*LORA, *WHOLE, "lora.alpha=7.5")),
    "tied": (2, (PP,), (*LORA, TIED, "lora.embeddings=true", "train.steps=9")),
    "one-kv": (2, (TP,), ("lora.rank=4", 'lora.targets=["v","q","down"]', "model.nheads_kv=1")),
    "bf16": (1, (), (*LORA, "train.dtype=bf16")),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return (folder of a run, results of rank 0) by kind."""
    found = {}
    for kind, (world_size, mesh, shape) in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        found[kind] = folder, run_ranks(trained, world_size, folder, (*mesh, *shape))[0]
    return found


@pytest.mark.parametrize("kind", ["whole", "tied", "one-kv"])
def test_loss_and_gradients_match_peft(runs: Any, kind: str) -> None:
    folder, ours = runs[kind]
    _, _, shape = KINDS[kind]
    peft: Any = peft_llama(small(*shape), ours["initial"])
    [steps] = run_ranks(batches, 1, shape)
    losses = torch.stack([peft_loss(peft, batch.tokens, batch.labels) for batch in steps])
    loss = losses.sum() / sum(batch.tokens.numel() for batch in steps)
    assert ours["loss"] == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    grads = {name: p.grad for name, p in peft.named_parameters() if p.requires_grad}
    for name, found in factors(ours["gradients"]).items():
        assert grads[name].count_nonzero(), name
        assert_matches(found, grads[name], 1e-5)
    whole = {"embed_tokens": "embedding.word_embeddings.weight", "model.norm": "final_layernorm"}
    whole |= {"lm_head": "output_layer.weight", "3.input_layernorm": "3.input_layernorm"}
    for theirs, name in whole.items():
        there = [g for n, g in grads.items() if f"{theirs}.modules_to_save" in n]
        [mine] = [g for n, g in ours["gradients"].items() if name in n] or [torch.zeros(1)]
        assert bool(there) == bool(mine.count_nonzero()), name
        for grad in there[:1]:
            assert_matches(mine[: len(grad)], grad, 1e-5)


def peft_loss(peft: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    out = peft(tokens).logits
    return torch.nn.functional.cross_entropy(out.flatten(0, 1), labels.flatten(), reduction="sum")


@pytest.mark.parametrize("kind", ["whole", "tied", "one-kv"])
def test_peft_loads_an_exported_adapter(runs: Any, tmp_path: Path, kind: str) -> None:
    folder, ours = runs[kind]
    config = small(*KINDS[kind][2])
    export_adapter(folder, tmp_path / "adapter")
    # Initial weights, so that modules trained whole must come from the folder.
    peft = PeftModel.from_pretrained(llama(config, ours["initial"]), tmp_path / "adapter")
    [[found]] = run_ranks(logits, 1, [folder], [])
    theirs = peft(TEXT[None]).logits[0]
    assert_matches(found, theirs, 1e-5)
    plain = llama(config, ours["initial"])(TEXT[None]).logits[0]
    assert (plain - theirs).norm() > 1e-2 * theirs.norm(), "the adapter proves nothing"
    with pytest.raises(ValueError, match="exists"):
        export_adapter(folder, tmp_path / "adapter")


def test_run_starts_from_an_adapter_saved_by_peft(runs: Any, tmp_path: Path) -> None:
    folder, ours = runs["whole"]
    shape = KINDS["whole"][2]
    peft_llama(small(*shape), ours["initial"]).save_pretrained(str(tmp_path / "theirs"))
    base = f"checkpoint.load={tmp_path / 'base'}"
    run_ranks(save_base, 1, tmp_path / "base", bare(shape))
    load = f"lora.load={tmp_path / 'theirs'}"
    for world_size, mesh in ((2, (TP, SP)), (2, (PP, "train.dtype=bf16")), (1, ())):
        (loss, weights), *_ = run_ranks(started, world_size, (*mesh, *shape, base, load))
        if "train.dtype=bf16" not in mesh:
            assert loss == pytest.approx(ours["loss"], rel=1e-5)
        for key, tensor in ours["initial"].items():
            rows = slice(250) if tensor.shape[0] == 256 else slice(None)
            assert torch.equal(weights[key][rows], tensor[rows].to(weights[key].dtype)), key


def test_run_starts_from_a_model_without_adapters(tmp_path: Path) -> None:
    run_ranks(save_base, 1, tmp_path / "base", ())
    there = weights_at(tmp_path / "base")
    base = f"checkpoint.load={tmp_path / 'base'}"
    [(plain, _)] = run_ranks(started, 1, (base,))
    (loss, weights), *_ = run_ranks(started, 2, (TP, SP, *LORA, base, "train.seed=3"))
    assert loss == pytest.approx(plain, rel=1e-6)
    adapters = {key for key in weights if ".lora." in key}
    assert len(adapters) == 4 * 7 * 2
    for key in weights.keys() - adapters:
        assert torch.equal(weights[key], there[key]), key


@pytest.mark.exhaustive
def test_adapters_resume_on_another_mesh(runs: Any) -> None:
    folder, ours = runs["whole"]
    shape, expected = KINDS["whole"][2], None
    for world_size, mesh in ((4, (TP, CP, SP)), (4, (TP, PP, "parallel.vp_size=2")), (1, ())):
        (weights, losses), *_ = run_ranks(resumed, world_size, folder, (*mesh, *shape))
        for key, tensor in ours["last"].items():
            assert torch.equal(weights[key], tensor), key
        expected = expected or losses
        assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [*KINDS])
def test_merged_weights_keep_the_logits(runs: Any, tmp_path: Path, kind: str) -> None:
    folder, ours = runs[kind]
    [[adapted, found]] = run_ranks(merged, 1, folder, tmp_path / "merged")
    assert_matches(found, adapted, 2e-2 if kind == "bf16" else 1e-5)
    there = weights_at(tmp_path / "merged")
    assert not [key for key in there if ".lora." in key or key.startswith("optimizer.")]
    scale = small(*KINDS[kind][2]).lora.scale
    down = "decoder.layers.2.mlp.linear_fc2."
    w, a, b = (
        ours["last"][f"{down}{k}"].double() for k in ("weight", "lora.down.A", "lora.down.B")
    )
    exact = w + scale * b @ a
    assert_matches(there[f"{down}weight"], exact, 1e-2 if kind == "bf16" else 1e-6)
    if kind == "bf16":
        # Summed in fp32 and rounded once: at most half of bf16's spacing from the exact sum, beside
        # rounding errors of fp32. How many numbers lie that near a tie depends on the CPU.
        half_spacing = torch.exp2(exact.abs().log2().floor() - 8)
        fp32_error = 2.0**-23 * (w.abs() + scale * b.abs() @ a.abs())
        excess = (there[f"{down}weight"].double() - exact).abs() - half_spacing
        assert (excess <= fp32_error).all()


@pytest.mark.parametrize("kind", ["one-kv", "bf16"])
def test_unmerge_restores_the_base_up_to_rounding(runs: Any, tmp_path: Path, kind: str) -> None:
    folder, ours = runs[kind]
    run_ranks(merged_and_back, 1, folder, tmp_path)
    there, rounding = weights_at(tmp_path / "base"), 2**-8 if kind == "bf16" else 2**-22
    between, changed = weights_at(tmp_path / "merged"), 0
    for key, tensor in there.items():
        base = ours["initial"][key].double()
        bound = rounding * (base.abs() + between[key].double().abs()) + 1e-9
        assert ((tensor.double() - base).abs() <= bound).all(), key
        changed += not torch.equal(between[key].double(), base)
    assert changed == 4 * (2 if kind == "one-kv" else 4)


def test_unmerge_of_whole_modules_is_rejected(runs: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="trained embeddings, norms, head whole"):
        unmerge(tmp_path, runs["whole"][0], tmp_path / "out")


# --- rejected adapters ----------------------------------------------------------------------------

OTHERS = {
    (): ("lora.rank is 3 there and 0 here", "merge"),
    (*LORA, "lora.rank=5"): ("lora.rank is 3 there and 5 here", "merge"),
    ("lora.rank=3", "lora.alpha=7.5"): ("lora.targets is", "merge"),
    (*LORA, "lora.alpha=8"): ("lora.alpha is 7.5 there and 8.0 here", "merge"),
}


@pytest.mark.parametrize("words", OTHERS, ids=str)
def test_resume_with_other_adapters_is_rejected(runs: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_fitting(runs["whole"][0], small(*words))
    for part in OTHERS[words]:
        assert part in str(caught.value)


def test_weights_with_other_adapters_are_not_loaded(runs: Any) -> None:
    folder = runs["whole"][0]
    [message] = run_ranks(read_without, 1, folder, ("train.steps=3",))
    assert "linear_fc1.lora.gate.A has shape (3, 64) in the checkpoint and is absent" in message
    assert "(56 differ)" in message
    [message] = run_ranks(read_without, 1, folder, (*LORA, "lora.rank=2"))
    assert "has shape (3, 64) in the checkpoint and has shape (2, 64) in the model" in message


def change(table: dict[str, Any], **words: Any) -> None:
    table.update(words)


def cut(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name][:2].contiguous()})


A = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"
BAD: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], str]] = {
    "rank": (lambda t: change(t, r=8), bool, "its r is 8, lora.rank is 3"),
    "alpha": (lambda t: change(t, lora_alpha=9), bool, "lora.alpha is 7.5, set it to 9"),
    "rslora": (lambda t: change(t, use_rslora=True), bool, "set it to 12.99"),
    "dora": (
        lambda t: change(t, use_dora=True),
        bool,
        "use_dora is True, which lcdist does not support",
    ),
    "bias": (lambda t: change(t, bias="all"), bool, "bias is 'all'"),
    "pattern": (lambda t: change(t, rank_pattern={"q_proj": 2}), bool, "rank_pattern is {'q_proj'"),
    "init": (lambda t: change(t, init_lora_weights="pissa"), bool, "changes the base weights"),
    "kind": (lambda t: change(t, peft_type="IA3"), bool, "peft_type is 'IA3', not 'LORA'"),
    "shape": (bool, cut(A), f"{A} has shape [2, 64], not [3, 64]"),
    "missing": (bool, lambda t: t.pop(A), f"{A} is missing"),
    "extra": (bool, lambda t: change(t, more=torch.ones(1)), "more belongs to no target"),
}


@pytest.mark.parametrize("case", BAD)
def test_adapter_that_does_not_fit_is_rejected(runs: Any, tmp_path: Path, case: str) -> None:
    config = small(*KINDS["whole"][2])
    export_adapter(runs["whole"][0], tmp_path / "adapter")
    assert len(check_adapter(tmp_path / "adapter", config)) == 56 + 9 + 2
    in_config, in_tensors, message = BAD[case]
    (tmp_path / "adapter" / SUMS).unlink()
    file = tmp_path / "adapter" / "adapter_config.json"
    table = json.loads(file.read_text())
    in_config(table)
    file.write_text(json.dumps(table))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    in_tensors(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError) as caught:
        check_adapter(tmp_path / "adapter", config)
    assert message in str(caught.value)


def test_untied_output_layer_is_rejected(runs: Any, tmp_path: Path) -> None:
    config, folder = small(*KINDS["tied"][2]), tmp_path / "adapter"
    export_adapter(runs["tied"][0], folder)
    check_adapter(folder, config)
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{folder} is damaged: file {file.name} has sha256 "):
        check_adapter(folder, config)
    file.write_bytes(whole)
    (folder / SUMS).unlink()
    apart, alone = load_file(file), load_file(file)
    apart["base_model.model.lm_head.weight"][3, 5] += 1
    del alone["base_model.model.lm_head.weight"]
    for tensors in (apart, alone):
        save_file(tensors, file)
        with pytest.raises(ValueError, match="differ, and model.tied_embeddings"):
            check_adapter(folder, config)


def test_whole_module_must_be_trained_by_the_run(runs: Any, tmp_path: Path) -> None:
    export_adapter(runs["whole"][0], tmp_path / "adapter")
    with pytest.raises(
        ValueError, match="embed_tokens.weight was trained too: set lora.embeddings"
    ):
        check_adapter(tmp_path / "adapter", small(*LORA, "lora.alpha=7.5"))
    shutil.move(tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="safe_serialization"):
        check_adapter(tmp_path / "adapter", small(*LORA))
