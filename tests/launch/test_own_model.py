"""What a model of the user's own may be, and what its extension is made of."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers

from lcdist.config import load
from lcdist.config.rope import (
    Rope,
    RopeDynamic,
    RopeLlama3,
    RopeLong,
    RopePI,
    RopePlain,
    RopeYarn,
)
from lcdist.convert.huggingface.fit_config import fit_config, open_user_model, scaled_rope
from lcdist.data.tokenizers.sentencepiece_bpe import train_tokenizer
from tests.convert.hf import make_model, save
from tests.launch.conftest import TINY, Start

SENTENCE = "the quick brown fox jumps over the lazy dog and the small cat sat on a mat, again\n"
DYNAMIC = RopeDynamic(factor=2.0, original_seqlen=512)
LONG = RopeLong(original_seqlen=64, short_factors=(1.0,) * 8, long_factors=(2.0,) * 8)


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        (RopePlain(base=5e5), RopePI(base=5e5, factor=8.0)),
        # Interpolated before: the factors multiply.
        (RopePI(factor=4.0), RopePI(factor=32.0)),
        (RopeLlama3(factor=8.0), RopeLlama3(factor=64.0)),
        (DYNAMIC, DYNAMIC),
        # YaRN counts from what it was first trained on; the usual attention factor follows.
        (RopeYarn(factor=4.0, original_seqlen=128), RopeYarn(factor=32.0, original_seqlen=128)),
        (
            RopeYarn(factor=4.0, original_seqlen=128, attention_factor=1.138629436),
            RopeYarn(factor=32.0, original_seqlen=128),
        ),
        (
            RopeYarn(factor=4.0, original_seqlen=128, attention_factor=1.5),
            RopeYarn(factor=32.0, original_seqlen=128, attention_factor=1.5),
        ),
        (RopeYarn(factor=64.0, original_seqlen=512), RopeYarn(factor=64.0, original_seqlen=512)),
    ],
)
def test_a_rotation_is_stretched_by_its_own_rule(rope: Rope, wanted: Rope) -> None:
    assert scaled_rope(rope, 512, 4096) == wanted


def test_searched_factors_are_not_stretched() -> None:
    with pytest.raises(ValueError, match="searched for 512 tokens; none are known for 4096"):
        scaled_rope(LONG, 512, 4096)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save(make_model(num_hidden_layers=2, vocab_size=320), folder)
    (folder / "tokenizer.model").write_bytes(train_tokenizer([SENTENCE * 40], 320))
    return folder


def test_the_configuration_gets_the_model(source: Path) -> None:
    """Shape, rotation, rate and, for landmarks, one row more; overrides have the last word."""
    hf = open_user_model(source)
    config = load(TINY / "extend.toml")
    found = fit_config(config, hf, [], 2)
    assert found.model == replace(hf.model, rope=RopePI(base=5e5, factor=256 / 40))
    # 48 wide, and the configuration was written for 32; LoRA takes greater rates.
    assert found.optim.lr == pytest.approx(5e-3 / 4 * 32 / 48)
    adapted = load(TINY / "extend.toml", ["lora.rank=2", "optim.lr=1e-6"])
    assert fit_config(adapted, hf, [], 2).optim.lr == pytest.approx(1e-6 * 32 / 48)
    kept = fit_config(adapted, hf, ["optim.lr=1e-6"], 2).optim
    assert kept.lr == 1e-6 and kept.min_lr == min(1e-6, adapted.optim.min_lr)
    assert found.train == config.train and found.evaluate == config.evaluate
    wide = replace(config, model=replace(config.model, hidden_size=96))
    assert fit_config(wide, hf, [], 2).optim.lr == 5e-3 / 4
    yarn = ["model.rope.scaling=yarn", "model.rope.factor=7", "model.rope.original_seqlen=40"]
    asked = fit_config(config, hf, yarn, 2).model.rope
    assert asked == RopeYarn(base=5e5, factor=7.0, original_seqlen=40)
    searched = replace(hf, model=replace(hf.model, rope=LONG))
    with pytest.raises(ValueError, match="model.rope.scaling=pi model.rope.factor=6.4"):
        fit_config(config, searched, [], 2)
    assert fit_config(config, searched, yarn, 2).model.rope == replace(asked, base=LONG.base)
    marked = load(TINY / "extend.toml", ["attention.method=landmark"])
    assert fit_config(marked, hf, [], 2).model.vocab_size == 321


def test_too_little_text_is_refused_before_the_training(
    start: Start, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("evaluate.tokens=1000000", model=source) == 2
    assert "lower evaluate.tokens or evaluate.lengths" in capsys.readouterr().err
    assert (tmp_path / "runs/job/data").exists() and not (tmp_path / "runs/job/extend").exists()


def test_a_tokenizer_json_may_have_fewer_tokens_than_the_model(
    source: Path, tmp_path: Path
) -> None:
    """Published models pad their vocabulary; which token ends a text has to be said, though."""
    own = shutil.copytree(source, tmp_path / "own")
    (own / "tokenizer.model").unlink()
    words = {f"w{number}": number for number in range(300)} | {"</s>": 300}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    made.save(str(own / "tokenizer.json"))
    with pytest.raises(ValueError, match="nothing says which token ends a text"):
        open_user_model(own)
    (own / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert open_user_model(own).model.vocab_size == 320


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()


def another_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(train_tokenizer([SENTENCE * 40], 310))


def long_already(folder: Path) -> None:
    table = json.loads((folder / "config.json").read_text())
    table["max_position_embeddings"] = 256
    (folder / "config.json").write_text(json.dumps(table))


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


def two_heads(folder: Path) -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    save(make_model(num_hidden_layers=2, vocab_size=320, **heads), folder)


def nothing(folder: Path) -> None: ...


@pytest.mark.parametrize(
    ("spoil", "words", "named"),
    [
        (gone, (), "no such folder"),
        (without_config, (), "it has no config.json"),
        (without_tokenizer, (), "has no tokenizer: neither tokenizer.json nor tokenizer.model"),
        (another_tokenizer, (), "its tokenizer has 310 tokens and the model 320"),
        (
            long_already,
            ("--length", "256"),
            "already has a context of 256 tokens, and the run extends it to 256",
        ),
        (two_heads, ("--method", "scca", "attention.pattern=longmixed"), "at least 4 query heads"),
        (nothing, ("model.rope.factors=3",), "model.rope.factor"),
        (nothing, ("model.hidden_size=64",), "model.hidden_size = 64: the model has 48"),
        (nothing, ("--method", "coco"), "must be one of full, coca"),
        (
            nothing,
            ("--method", "scca", "parallel.cp_size=3"),
            "not a multiple",
        ),
    ],
)
def test_mistakes_are_named_before_anything_is_spent(
    start: Start,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    words: tuple[str, ...],
    named: str,
) -> None:
    own = shutil.copytree(source, tmp_path / "own")
    spoil(own)
    assert start(*words, model=own) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and named in lines[0]
    assert not (tmp_path / "runs").exists()
