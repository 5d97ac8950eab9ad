"""Exports with custom attention are imported again, and a vocabulary grows for landmarks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lcdist.checkpoint.read import open_checkpoint, saved_config
from lcdist.checkpoint.tensors import CheckpointTensors
from lcdist.commands.main import main
from lcdist.convert.check import ConversionError
from lcdist.convert.huggingface.export_model import export_model
from lcdist.convert.huggingface.import_model import import_model
from lcdist.convert.remote_files import ATTENTION_FILE, load_remote_attention, read_remote_files
from tests.convert.hf import export_all, import_all, make_model, save
from tests.convert.own_runs import CASES
from tests.convert.test_export import read_all
from tests.distributed import run_ranks
from tests.engines.internals import chunks_of
from tests.model.small import Meshes, small

BACK = ("mixed", "mixed-marks", "fold-2")


def save_all(rank: int, world_size: int, folder: Path) -> None:
    meshes = Meshes()
    for name in BACK:
        own = ("train.seqlen=40", f"log.folder={folder / name}")
        trainer = meshes.trainer(small(*CASES[name], *own))
        with torch.no_grad():
            for parameter in chunks_of(trainer)[0].parameters():
                parameter.add_(0.25 * torch.randn_like(parameter))
        trainer.save(wait=True)
    export_all(0, 1, [(folder / n, folder / "hf" / n, 60_000) for n in BACK])
    import_all(0, 1, [(folder / "hf" / n, folder / "ours" / n, ()) for n in BACK])
    export_all(0, 1, [(folder / "ours" / n, folder / "again" / n, 60_000) for n in BACK])


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of NAME, hf/NAME, ours/NAME, again/NAME: run, export, import, export."""
    folder = tmp_path_factory.mktemp("back")
    run_ranks(save_all, 1, folder)
    return folder


@pytest.mark.parametrize("case", BACK)
def test_round_trip_is_bit_equal(case: str, round_trip: Path) -> None:
    """Compare every tensor, parameters of methods included, and the attention of every layer."""
    first, second = (read_all(round_trip / kind / case) for kind in ("hf", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    biased = [name for name in first if name.endswith("self_attn.branch_bias")]
    assert len(biased) == {"mixed": 1, "mixed-marks": 0, "fold-2": 4}[case]
    before, after = (
        saved_config(open_checkpoint(round_trip / path)) for path in (case, f"ours/{case}")
    )
    assert before.attention == after.attention and before.model.rope == after.model.rope
    tables = [
        json.loads((round_trip / kind / case / "config.json").read_text())
        for kind in ("hf", "again")
    ]
    assert tables[0]["lcdist"] == {**tables[1]["lcdist"], "step": tables[0]["lcdist"]["step"]}


def edited(round_trip: Path, tmp_path: Path, case: str, **changes: Any) -> Path:
    """Copy an export with keys of config.json, or of its table "lcdist", replaced."""
    source = round_trip / "hf" / case
    table = json.loads((source / "config.json").read_text())
    for key, value in changes.items():
        (table["lcdist"] if key in table["lcdist"] else table)[key] = value
    folder = tmp_path / "edited"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(table))
    return folder


@pytest.mark.parametrize(
    ("case", "changes", "said"),
    [
        ("fold-2", {"method": "coca"}, "unknown key 'lcdist.modes'"),
        ("fold-2", {"attention": []}, r"lcdist.attention = \[\]: its method and options mean"),
        ("mixed", {"method": "ring", "options": {}}, "'ring': must be one of full, coca"),
        ("mixed", {"auto_map": {"AutoConfig": "x.Y"}}, "auto_map = .* exports of lcdist have"),
        ("mixed", {"qkv_bias": 1}, "lcdist.qkv_bias = 1: expected true or false"),
        (
            "mixed",
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "auto_map": None},
            "a plain LlamaForCausalLM has full attention",
        ),
    ],
)
def test_inconsistent_config_is_rejected(
    case: str, changes: dict[str, Any], said: str, round_trip: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        import_model(edited(round_trip, tmp_path, case, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_override_that_changes_attention_is_rejected(round_trip: Path, tmp_path: Path) -> None:
    source = round_trip / "hf" / "mixed-marks"
    with pytest.raises(ValueError, match=r"attention.layers = 'coca@0': .* an import keeps it"):
        import_model(source, tmp_path / "out", ["attention.layers=coca@0"])
    with pytest.raises(
        ValueError,
        match="the last of the model's 250 tokens is its landmark and must stay the last",
    ):
        import_model(source, tmp_path / "out", extra_tokens=1)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("scores + bias[0][mode - 1, :, None, None] if mode", "scores if mode"),
        ("(digit <= digit[start:stop, None] - self.near)", "(digit <= digit[start:stop, None])"),
    ],
)
def test_faulty_model_code_is_detected(
    right: str, wrong: str, round_trip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Show that the exported code itself is compared with the training model."""
    text = read_remote_files()[ATTENTION_FILE]
    assert text.count(right) == 1
    faulty: dict[str, Any] = {}
    exec(compile(text.replace(right, wrong), "faulty", "exec"), faulty)
    monkeypatch.setattr(load_remote_attention(), "attend", faulty["attend"])
    with pytest.raises(ConversionError, match="this is more than rounding"):
        export_model(round_trip / "fold-2", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_vocabulary_grows_for_landmarks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """New rows start as the mean of the others; the model trains, exports and keeps old rows."""
    source = save(make_model(num_hidden_layers=2), tmp_path / "source")
    ours, run = tmp_path / "ours", tmp_path / "run"
    marks = ["attention.method=landmark", "attention.block_size=5"]
    words = ["convert", "import", str(source), str(ours), "--extra-tokens", "1"]
    assert main([*words, "model.vocab_size=300"]) == 2
    assert "--extra-tokens 1 and model.vocab_size both set" in capsys.readouterr().err
    assert main([*words, *marks]) == 0
    assert (
        "vocabulary extended by 1, new rows are the mean of the others" in capsys.readouterr().out
    )
    checkpoint = open_checkpoint(ours)
    config, stored = saved_config(checkpoint), CheckpointTensors(checkpoint)
    assert config.model.vocab_size == 251
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        rows = stored.rows(name, 0, 251)
        torch.testing.assert_close(rows[250], rows[:250].mean(0))
    run_ranks(train_on, 1, ours, run)
    assert main(["convert", "export", str(run), str(tmp_path / "hf")]) == 0
    table = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert table["vocab_size"] == 251 and table["lcdist"]["method"] == "landmark"
    before, after = read_all(source), read_all(tmp_path / "hf")
    assert before.keys() == after.keys()
    assert after["lm_head.weight"].shape[0] == 251
    # Without landmarks it is a plain model with two more tokens.
    assert (
        main(["convert", "import", str(source), str(tmp_path / "plain"), "--extra-tokens=2"]) == 0
    )
    assert main(["convert", "export", str(tmp_path / "plain"), str(tmp_path / "back")]) == 0
    grown = read_all(tmp_path / "back")["model.embed_tokens.weight"]
    assert torch.equal(grown[:250], before["model.embed_tokens.weight"])
    torch.testing.assert_close(grown[250:], grown[:250].mean(0).expand(2, -1))


def train_on(rank: int, world_size: int, ours: Path, run: Path) -> None:
    config = saved_config(open_checkpoint(ours))
    data = small("data.source=synthetic").data
    config = replace(config, data=data, log=replace(config.log, folder=str(run)))
    config = replace(config, checkpoint=replace(config.checkpoint, load=str(ours)))
    trainer = Meshes().trainer(config)
    trainer.engine.forward_backward(trainer.loader.next_step())
    trainer.engine.step(1e-3)
    trainer.step += 1
    trainer.save(wait=True)
