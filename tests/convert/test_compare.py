"""The comparison after a conversion detects planted faults, and no output is kept."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from lcdist.config.rope import RopeLlama3
from lcdist.convert.check import ConversionError
from lcdist.convert.huggingface import export_model as exporting
from lcdist.convert.huggingface import import_model as importing
from lcdist.convert.huggingface import import_tensors, names
from lcdist.convert.huggingface.import_model import import_model
from lcdist.convert.huggingface.names import EMBEDDING, OUTPUT, FusedTensor, SourceRows
from tests.checkpoint.stored import stored_tensors
from tests.convert.hf import make_model, save
from tests.distributed import run_ranks

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model(num_hidden_layers=2, rope_parameters=LLAMA3)
    return save(model, tmp_path_factory.mktemp("source"))


def with_parts(key: str, change: Callable[[tuple[SourceRows, ...]], tuple[SourceRows, ...]]) -> Any:
    """Patch the table of names: change the parts of one of our tensors."""

    def wrong(model: Any) -> list[FusedTensor]:
        table = names.fused_tensors(model)
        return [replace(o, parts=change(o.parts)) if o.key.endswith(key) else o for o in table]

    return patch.multiple(importing, fused_tensors=wrong)


def by_kind(parts: tuple[SourceRows, ...]) -> tuple[SourceRows, ...]:
    """Order parts as all queries, all keys, all values, instead of group by group."""
    return parts[0::3] + parts[1::3] + parts[2::3]


def interleaved(parts: tuple[SourceRows, ...]) -> tuple[SourceRows, ...]:
    """Order rows of queries and keys in neighbouring pairs, as in Meta's files."""
    found: list[SourceRows] = []
    for part in parts:
        if ".v_proj." in part.name:
            found.append(part)
            continue
        for head in range(part.first, part.first + part.count, 20):
            found += [SourceRows(part.name, head + i // 2 + i % 2 * 10, 1) for i in range(20)]
    return tuple(found)


def swapped_norms() -> Any:
    def wrong(model: Any) -> list[FusedTensor]:
        table = {ours.key: ours for ours in names.fused_tensors(model)}
        for layer in range(model.num_layers):
            one, other = (
                f"decoder.layers.{layer}.{name}.weight"
                for name in ("input_layernorm", "pre_mlp_layernorm")
            )
            table[one], table[other] = (
                replace(table[one], parts=table[other].parts),
                replace(table[other], parts=table[one].parts),
            )
        return list(table.values())

    return patch.multiple(importing, fused_tensors=wrong)


def config_with(**changes: Any) -> Any:
    """Patch the reading of config.json to return wrong values."""
    right = importing.read_config

    def wrong(folder: Path) -> Any:
        hf = right(folder)
        return replace(hf, model=replace(hf.model, **changes))

    return patch.multiple(importing, read_config=wrong)


def norm_left() -> Any:
    right = import_tensors._fused_rows

    def wrong(ours: FusedTensor, *rest: Any) -> torch.Tensor:
        found = right(ours, *rest)
        return torch.ones_like(found) if ours.key.endswith("1.input_layernorm.weight") else found

    return patch.multiple(import_tensors, _fused_rows=wrong)


FAULTS: dict[str, Callable[[], Any]] = {
    "queries before keys": lambda: with_parts("linear_qkv.weight", by_kind),
    "pairs beside each other": lambda: with_parts("linear_qkv.weight", interleaved),
    "gate and up swapped": lambda: with_parts("linear_fc1.weight", lambda parts: parts[::-1]),
    "norms swapped": swapped_norms,
    "a norm left at 1": norm_left,
    "rope misread": lambda: config_with(rope=RopeLlama3(factor=4.0, base=1e4, original_seqlen=17)),
    "epsilon misread": lambda: config_with(norm_eps=1e-5),
    "heads misread": lambda: config_with(nheads=2, nheads_kv=1, head_dim=40),
}


def plant(rank: int, world_size: int, source: Path, folder: Path) -> dict[str, str]:
    """Import with each fault; return the error messages."""
    said = {}
    for fault, make in FAULTS.items():
        with make():
            try:
                import_model(source, folder / "out")
                said[fault] = "nothing"
            except ConversionError as error:
                said[fault] = str(error)
        assert not list(folder.iterdir()), fault
    return said


def test_every_fault_is_detected(source: Path, tmp_path: Path) -> None:
    said = run_ranks(plant, 1, source, tmp_path)[0]
    for fault, words in said.items():
        assert "nothing is kept" in words, (fault, words)
    assert "rotation" in said["rope misread"]


def plant_in_export(rank: int, world_size: int, source: Path, folder: Path) -> str:
    import_model(source, folder / "ours")
    right = exporting.config_table

    def wrong(*words: Any) -> dict[str, Any]:
        table = right(*words)
        return {**table, "rope_scaling": {**table["rope_scaling"], "factor": 4.1}}

    with patch.multiple(exporting, config_table=wrong):
        try:
            exporting.export_model(folder / "ours", folder / "hf")
        except ConversionError as error:
            return str(error)
    return "nothing"


def test_export_is_compared_as_written(source: Path, tmp_path: Path) -> None:
    said = run_ranks(plant_in_export, 1, source, tmp_path)[0]
    assert said.startswith("rotation at ")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def grow(rank: int, world_size: int, source: Path, out: Path) -> None:
    import_model(source, out, ["model.vocab_size=259"])


def test_new_tokens_start_as_the_mean_of_the_others(source: Path, tmp_path: Path) -> None:
    run_ranks(grow, 1, source, tmp_path / "out")
    held = stored_tensors(tmp_path / "out" / "checkpoints" / "step_00000000")
    for key in (EMBEDDING, OUTPUT):
        assert held[key].shape == (384, 48)
        mean = held[key][:250].double().mean(0).float()
        assert torch.equal(held[key][250:259], mean.expand(9, -1))
        assert not held[key][259:].any()


def in_half_precision(rank: int, world_size: int, source: Path, out: Path) -> None:
    import_model(source, out)


def test_fp16_is_stored_exactly_as_fp32(tmp_path: Path) -> None:
    model = make_model("llama2", num_hidden_layers=1).half()
    source = save(model, tmp_path / "hf")
    assert json.loads((source / "config.json").read_text())["dtype"] == "float16"
    run_ranks(in_half_precision, 1, source, tmp_path / "out")
    held = stored_tensors(tmp_path / "out" / "checkpoints" / "step_00000000")
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}
    down = model.model.layers[0].mlp.down_proj.weight
    assert torch.equal(held["decoder.layers.0.mlp.linear_fc2.weight"], down.float())
