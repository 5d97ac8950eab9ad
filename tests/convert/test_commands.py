"""`lcdist convert` from the command line, then generate, train and export."""

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from lcdist.checkpoint.read import open_checkpoint, saved_config
from lcdist.commands.convert import parse_size
from lcdist.commands.main import main
from lcdist.config import dump
from lcdist.config.rope import RopePI
from lcdist.config.schema import CocaOptions
from lcdist.convert.ancestors import base_model
from lcdist.data.tokenizers.sentencepiece_bpe import train_tokenizer
from tests.convert.hf import logits_of, make_model, save, tokens
from tests.model.small import small
from tests.tolerance import assert_matches

VOCAB = 320
TEXT = "the quick brown fox jumps over the lazy dog and the small cat sat on a mat, again\n" * 40


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model with tokenizer files."""
    folder = tmp_path_factory.mktemp("source")
    save(make_model(num_hidden_layers=2, vocab_size=VOCAB, eos_token_id=1), folder)
    (folder / "tokenizer.model").write_bytes(train_tokenizer([TEXT], VOCAB))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 40}')
    return folder


def test_import_generate_train_export(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train two steps on longer text with another rotary scaling."""
    ours, run, back = tmp_path / "ours", tmp_path / "run", tmp_path / "back"
    assert main(["convert", "import", str(source), str(ours), "train.seqlen=24"]) == 0
    said = capsys.readouterr().out
    assert f"wrote {ours}" in said and "maximum difference of logits" in said
    assert (ours / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    config = saved_config(open_checkpoint(ours))
    assert config.train.seqlen == 24 and config.model.nheads_kv == 2

    prompt = ["--prompt", "the quick", "--max-new-tokens", "4", "--temperature", "0"]
    assert main(["generate", str(ours), *prompt]) == 0
    assert capsys.readouterr().out.startswith("the quick")

    words = tomllib.loads(dump(config))["model"]
    model = [f"model.{key}={json.dumps(value)}" for key, value in words.items() if key != "rope"]
    rope = ["model.rope.scaling=pi", "model.rope.base=500000.0", "model.rope.factor=2.0"]
    own = [*model, *rope, f"checkpoint.load={ours}", f"log.folder={run}", "train.steps=2"]
    (tmp_path / "extend.toml").write_text(dump(small(*own, "train.seqlen=80")))
    assert main(["train", str(tmp_path / "extend.toml")]) == 0

    assert main(["convert", "export", str(run), str(back), "--shard-size", "50KB"]) == 0
    assert "weights in " in capsys.readouterr().out
    table = json.loads((back / "config.json").read_text())
    assert table["max_position_embeddings"] == 80 and table["eos_token_id"] == 1
    assert table["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 2.0}
    assert table["lcdist"]["step"] == 2
    assert (back / "tokenizer.model").exists() and (back / "tokenizer_config.json").exists()
    # Two steps at a small learning rate: another model, and not by much.
    before, after = logits_of(source, tokens(6)), logits_of(back, tokens(6))
    assert (before - after).abs().max() > 1e-4 and before.shape == after.shape
    # What comes back in is what was trained.
    assert main(["convert", "import", str(back), str(tmp_path / "again")]) == 0
    again = saved_config(open_checkpoint(tmp_path / "again"))
    assert again.train.seqlen == 80 and again.model.rope.scaling == "pi"


def test_an_adapter_names_the_model_that_it_belongs_on(source: Path, tmp_path: Path) -> None:
    hf, ours = shutil.copytree(source, tmp_path / "hf"), tmp_path / "ours"
    assert main(["convert", "import", str(hf), str(ours)]) == 0
    imported = saved_config(open_checkpoint(ours))
    started = replace(imported, checkpoint=replace(imported.checkpoint, load=str(ours)))
    assert base_model(started) == str(hf.resolve()) and base_model(imported) is None
    # On the source an adapter for another rotation or method would read text in another way.
    scaled = replace(started.model, rope=RopePI(base=started.model.rope.base, factor=2.0))
    assert base_model(replace(started, model=scaled)) is None
    coca = replace(started.attention, method="coca", options=CocaOptions())
    assert base_model(replace(started, attention=coca)) is None
    shutil.rmtree(hf)
    assert base_model(started) is None


def test_user_errors_exit_with_status_2(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "import", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "none: no such folder; give one with config.json" in capsys.readouterr().err
    assert main(["convert", "export", "a", "b", "--shard-size", "many"]) == 2
    assert "expected a size such as 5GB" in capsys.readouterr().err


def test_parse_size_accepts_units() -> None:
    assert parse_size("5GB") == 5 * 10**9 and parse_size("512MiB") == 2**29
    assert parse_size("1.5 kb") == 1500 and parse_size("77") == 77


def test_random_models_distinguish_texts(source: Path) -> None:
    """Show that comparisons of logits do not compare constants."""
    logits = logits_of(source, tokens(6))
    with pytest.raises(AssertionError):
        assert_matches(logits[0, 1], logits[0, 2], 0.1)


def test_imported_model_cannot_be_resumed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = tmp_path / "ours"
    assert main(["convert", "import", str(source), str(ours)]) == 0
    assert main(["evaluate", str(ours)]) == 2
    said = capsys.readouterr().err
    assert "is an imported model, which has no text" in said and "data.path=FOLDER" in said
    words = tomllib.loads(dump(saved_config(open_checkpoint(ours))))["model"]
    model = [f"model.{key}={json.dumps(value)}" for key, value in words.items() if key != "rope"]
    (tmp_path / "train.toml").write_text(dump(small(*model, f"log.folder={ours}")))
    assert main(["train", str(tmp_path / "train.toml")]) == 2
    said = capsys.readouterr().err
    assert "holds an imported model" in said and f"checkpoint.load={ours}" in said
