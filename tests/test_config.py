"""Configuration: messages name the key, and all mistakes are reported together."""

import dataclasses
import pickle
import subprocess
import sys
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcdist.config import ConfigError, dump, load, parse
from lcdist.config import rope as ropes
from lcdist.config.build import build_options
from lcdist.config.schema import (
    OPTIONS,
    AttentionConfig,
    Config,
    FullOptions,
    RawOptions,
)
from lcdist.config.values import folder_problem

ROOT = Path(__file__).parent.parent


def table(**sections: Any) -> dict[str, Any]:
    """Return a TOML table with every required key, updated by `sections`."""
    model = {"vocab_size": 256, "num_layers": 2, "hidden_size": 64, "nheads": 4}
    smallest = {
        "model": model | {"ffn_hidden_size": 96},
        "train": {"seqlen": 32, "steps": 5},
        "log": {"folder": "runs/x"},
    }
    for name, keys in sections.items():
        smallest[name] = smallest.get(name, {}) | keys if isinstance(keys, dict) else keys
    return smallest


def errors_of(raw: Mapping[str, Any], *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(raw, overrides)
    return list(caught.value.errors)


def test_required_keys_suffice_and_the_schema_has_defaults() -> None:
    config = parse(table())
    assert config.train.seqlen == 32 and config.attention.options == FullOptions()
    assert config.model.rope == ropes.RopePlain() and config.optim.beta2 == 0.95


def pairs(text: str) -> list[tuple[str, str]]:
    """Return (input, message) pairs from alternating lines."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return list(zip(lines[::2], lines[1::2], strict=True))


MISTAKES = """
train.seq_length = 1
    unknown key 'train.seq_length'; did you mean 'train.seqlen'?
paralel.cp_size = 2
    unknown key 'paralel'; did you mean 'parallel'?
model.seqlen = 8
    unknown key 'model.seqlen'; did you mean 'train.seqlen'?
log.zzz = 1
    unknown key 'log.zzz'; known keys: folder, tensorboard, wandb, wandb_project, peak_tflops
attention.chunk = 1
    unknown key 'attention.chunk'; known keys: method, layers, impl, length_scale
attention.metod = "full"
    unknown key 'attention.metod'; did you mean 'attention.method'?
attention.options = {}
    unknown key 'attention.options'; known keys: method, layers, impl, length_scale

train.seqlen = "128k"
    train.seqlen = '128k': expected a whole number, got text
train.seqlen = true
    train.seqlen = True: expected a whole number, got true or false
train.seqlen = 8.0
    train.seqlen = 8.0: expected a whole number, got a number
train.seqlen = {a = 1}
    train.seqlen = {'a': 1}: expected a whole number, got a table
model.tied_embeddings = 1
    model.tied_embeddings = 1: expected true or false, got a whole number
optim.lr = true
    optim.lr = True: expected a number, got true or false
optim.lr = "3e-4"
    optim.lr = '3e-4': expected a number, got text
data.path = 2026-01-02
    data.path = datetime.date(2026, 1, 2): expected text, got date
evaluate.lengths = 512
    evaluate.lengths = 512: expected a list, got a whole number
data.mixture = ["a", "b"]
    data.mixture = ['a', 'b']: expected a table of tables, got a list
data.mixture.code = "a"
    data.mixture.code = 'a': expected a table of keys, got text
data.mixture.code.weight = 2.0
    missing key 'data.mixture.code.path': it has no default
data.mixture.code = {path = "a", weigth = 1.0}
    unknown key 'data.mixture.code.weigth'; did you mean 'data.mixture.code.weight'?
data.mixture.code = {path = "a", weight = 0}
    data.mixture.code.weight = 0.0: must be greater than 0
data.long_factor = [2.0, 0.0]
    data.long_factor[1] = 0.0: must be greater than 0
evaluate.measure = ["x"]
    evaluate.measure[0] = 'x': must be one of perplexity, position, longppl, passkey, needle, ruler
evaluate.lengths = [512, "1k"]
    evaluate.lengths[1] = '1k': expected a whole number, got text
attention.method = ["full"]
    attention.method = ['full']: expected text, got a list
train = 3
    train = 3: expected a table of keys, got a whole number
train = [{}]
    train = [{}]: expected a table of keys, got a list

train.dtype = "fp16"
    train.dtype = 'fp16': must be one of auto, fp32, bf16
train.dtype = ["fp32"]
    train.dtype = ['fp32']: must be one of auto, fp32, bf16
parallel.layout = true
    parallel.layout = True: must be one of auto, contiguous, zigzag, striped
train.steps = 0
    train.steps = 0: must be at least 1
optim.lr = 0
    optim.lr = 0.0: must be greater than 0
optim.lr = inf
    optim.lr = inf: must be finite
optim.beta1 = nan
    optim.beta1 = nan: must be finite

attention = {method = "coca", variant = "loose"}
    attention.variant = 'loose': must be one of slack, strict
attention = {layers = "coca@0", coca = {varant = "slack"}}
    unknown key 'attention.coca.varant'; did you mean 'attention.coca.variant'?
attention = {layers = "coca@0", coca = {variant = 3}}
    attention.coca.variant = 3: must be one of slack, strict
attention = {method = "lssar", coca = 3}
    unknown key 'attention.coca'; known keys: method, layers, impl, exempt_rows, power, reweight
attention = {method = "lssar", power = 0.9}
    attention.power = 0.9: must be at least 1
attention = {layers = 3}
    attention.layers = 3: expected text, got a whole number

model.rope.scaling = "spiral"
    model.rope.scaling = 'spiral': must be one of none, pi, ntk, yarn, llama3, dynamic, longrope
model.rope.scaling = ["pi"]
    model.rope.scaling = ['pi']: must be one of none, pi, ntk, yarn, llama3, dynamic, longrope
model.rope = "pi"
    model.rope = 'pi': expected a table of keys, got text
model.rope.factor = 2
    unknown key 'model.rope.factor'; known keys: scaling, base, extend
model.rope = {scaling = "pi", factr = 2}
    unknown key 'model.rope.factr'; did you mean 'model.rope.factor'?
model.rope = {scaling = "ntk", factor = 0.5}
    model.rope.factor = 0.5: must be at least 1
model.rope = {scaling = "dynamic"}
    missing key 'model.rope.original_seqlen': it has no default
"""


@pytest.mark.parametrize(("text", "message"), pairs(MISTAKES))
def test_mistake_names_the_key(text: str, message: str) -> None:
    assert errors_of(table(**tomllib.loads(text))) == [message]


def test_number_too_large_for_a_float_is_rejected() -> None:
    message = "optim.lr: the number is too large for a float"
    assert errors_of(table(optim={"lr": 10**400})) == [message]


def test_all_mistakes_are_reported_together() -> None:
    raw = table(train={"seqlen": "x", "steps": 0}, optm={}, model={"rope": {"scaling": "spiral"}})
    del raw["log"]
    with pytest.raises(ConfigError) as caught:
        parse(raw, ["evaluate.lengths=no", "steps=3"])
    assert str(caught.value).splitlines() == [
        "override 'steps=3': expected section.key=value; did you mean 'train.steps'?",
        "model.rope.scaling = 'spiral': must be one of none, pi, ntk, yarn, llama3, dynamic, "
        "longrope",
        "train.seqlen = 'x': expected a whole number, got text",
        "train.steps = 0: must be at least 1",
        "missing key 'log.folder': it has no default",
        "evaluate.lengths = 'no': expected a list, got text",
        "unknown key 'optm'; did you mean 'optim'?",
    ]


def test_config_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ConfigError(["one", "two"])))
    assert error.errors == ("one", "two") and str(error) == "one\ntwo"


def test_empty_file_reports_every_required_key() -> None:
    missing = [error.removesuffix(": it has no default") for error in errors_of({})]
    model = ["vocab_size", "num_layers", "hidden_size", "nheads", "ffn_hidden_size"]
    keys = [*(f"model.{key}" for key in model), "train.seqlen", "train.steps", "log.folder"]
    assert missing == [f"missing key '{key}'" for key in keys]


def test_integers_become_floats_and_lists_tuples() -> None:
    config = parse(table(optim={"lr": 1}, evaluate={"lengths": [16, 8]}))
    assert type(config.optim.lr) is float and config.optim.lr == 1.0
    assert config.evaluate.lengths == (16, 8)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({}, ropes.RopePlain()),
        ({"base": 500000}, ropes.RopePlain(base=500000.0)),
        ({"scaling": "pi", "factor": 8}, ropes.RopePI(factor=8.0)),
        ({"scaling": "ntk", "factor": 4, "base": 7}, ropes.RopeNTK(factor=4.0, base=7.0)),
        ({"scaling": "yarn", "original_seqlen": 9}, ropes.RopeYarn(original_seqlen=9)),
        ({"scaling": "llama3", "factor": 32}, ropes.RopeLlama3(factor=32.0)),
        ({"scaling": "dynamic", "original_seqlen": 9}, ropes.RopeDynamic(original_seqlen=9)),
        (
            {
                "scaling": "longrope",
                "original_seqlen": 9,
                "short_factors": [1, 2],
                "long_factors": [3, 4.5],
            },
            ropes.RopeLong(original_seqlen=9, short_factors=(1.0, 2.0), long_factors=(3.0, 4.5)),
        ),
    ],
)
def test_tag_selects_the_member_of_a_union(rope: dict[str, Any], expected: Any) -> None:
    assert parse(table(model={"rope": rope})).model.rope == expected


# --- options of a method, written beside its name -------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExternalOptions:
    window: int = dataclasses.field(default=8, metadata={"min": 1})
    variant: Literal["a", "b"] = "a"


def test_options_of_an_external_method_stay_raw_until_built() -> None:
    config = parse(table(attention={"method": "external", "window": 4, "impl": "torch"}))
    assert config.attention.impl == "torch"
    assert config.attention.options == RawOptions(table={"window": 4})
    assert build_options(ExternalOptions, config.attention.options) == ExternalOptions(window=4)


def test_raw_options_are_checked_as_strictly() -> None:
    with pytest.raises(ConfigError) as caught:
        build_options(ExternalOptions, RawOptions(table={"windw": 4, "variant": "c", "window": 0}))
    assert caught.value.errors == (
        "attention.window = 0: must be at least 1",
        "attention.variant = 'c': must be one of a, b",
        "unknown key 'attention.windw'; did you mean 'attention.window'?",
    )


# --- overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "keys", "value"),
    [
        ("train.steps=7", "train.steps", 7),
        (" train . steps = 7 ", "train.steps", 7),
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        ("log.wandb=true", "log.wandb", True),
        ("evaluate.lengths=[8, 9]", "evaluate.lengths", (8, 9)),
        ("evaluate.measure=[ perplexity ]", "evaluate.measure", ("perplexity",)),
        ("data.path='a b'", "data.path", "a b"),
        ("data.path=a b", "data.path", "a b"),
        ("data.path=/x=y#z", "data.path", "/x=y#z"),
        ("data.path=", "data.path", ""),
        ("data.path=one\ntwo = 2", "data.path", "one\ntwo = 2"),
        ("data.path='one'\ntwo = 2", "data.path", "'one'\ntwo = 2"),
        ("attention.method=full", "attention.method", "full"),
        ("model.rope.base=500000", "model.rope.base", 500000.0),
        ("model.rope={scaling = 'pi', factor = 2}", "model.rope", ropes.RopePI(factor=2.0)),
    ],
)
def test_override_is_a_toml_value_or_a_bare_word(override: str, keys: str, value: Any) -> None:
    node: Any = parse(table(), [override])
    for key in keys.split("."):
        node = getattr(node, key)
    assert node == value and type(node) is type(value)


def test_last_override_wins_and_the_table_is_not_changed() -> None:
    raw = table()
    assert parse(raw, ["train.steps=7", "train.steps=8"]).train.steps == 8
    assert raw == table()


MALFORMED = """
train.steps
    override 'train.steps': expected section.key=value
=7
    override '=7': expected section.key=value
train.=7
    override 'train.=7': expected section.key=value
seqlen=7
    override 'seqlen=7': expected section.key=value; did you mean 'train.seqlen'?
train.seqlen.x=7
    override 'train.seqlen.x=7': 'train.seqlen' is not a table
train.stepz=7
    unknown key 'train.stepz'; did you mean 'train.steps'?
evaluate.lengths=[8
    override 'evaluate.lengths=[8': the value is not TOML
evaluate.measure=[perplexity, 3]
    override 'evaluate.measure=[perplexity, 3]': the value is not TOML
data.path="x
    override 'data.path="x': the value is not TOML
"""


@pytest.mark.parametrize(("override", "message"), pairs(MALFORMED))
def test_malformed_override_is_reported(override: str, message: str) -> None:
    (error,) = errors_of(table(), override)
    assert error.split(" (")[0] == message


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("folder", "Is a directory"),
        (b"[model]\n\xff = 1\n", "not UTF-8"),
        (b"[model\n", "not TOML .*line 1"),
        (b"a = 1\na = 2\n", "not TOML .*line 2"),
        (b"a = " + b"9" * 5000, "not TOML"),
    ],
)
def test_unreadable_file_is_reported(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "run.toml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert caught.value.errors[0].startswith(f"cannot read configuration {path}: ")


def test_file_loads_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(dump(parse(table())), encoding="utf-8")
    assert load(path, ["train.steps=9"]) == parse(table(train={"steps": 9}))


# --- round trip -----------------------------------------------------------------------------------

# A TOML string may contain all of Unicode except surrogates, also control characters and quotes.
# NUL can be in no path.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
LEAVES = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    TEXT,
    st.dates(),
    st.times(),
    st.datetimes(),
)
RAW = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
OWN_KEYS = {field.name for field in dataclasses.fields(AttentionConfig)}
TABLES = st.dictionaries(TEXT.filter(lambda key: key not in OWN_KEYS | {*OPTIONS}), RAW, max_size=4)


def values_of(hint: Any, metadata: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Return a strategy for legal values of a field of the schema."""
    low = metadata.get("min", metadata.get("above"))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return trees(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        members = [member for member in typing.get_args(hint) if member is not types.NoneType]
        none = [st.none()] if len(members) < len(typing.get_args(hint)) else []
        return st.one_of(*none, *(values_of(member, metadata) for member in members))
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return st.lists(values_of(typing.get_args(hint)[0], metadata), max_size=4).map(tuple)
    if typing.get_origin(hint) is Mapping:
        inner = values_of(typing.get_args(hint)[1], {})
        return st.dictionaries(TEXT, inner, max_size=3)
    if hint is int:
        return st.integers(low, metadata["limit"].most)
    if hint is float:
        open_end = "above" in metadata
        return st.floats(low, metadata["limit"].most, exclude_min=open_end)
    if metadata.get("folder"):
        return TEXT.filter(lambda text: not folder_problem(text))
    return {bool: st.booleans(), str: TEXT}[hint]


@st.composite
def trees(draw: st.DrawFn, cls: type = Config) -> Any:
    """Draw a legal instance of a dataclass of the schema."""
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name == "options":
            values["options"] = draw(options_of(values["method"]))
        elif field.name == "others":
            names = st.lists(st.sampled_from(sorted(OPTIONS)), unique=True, max_size=2)
            values["others"] = {name: draw(options_of(name)) for name in draw(names)}
        elif field.name == "method":
            values["method"] = draw(st.sampled_from(sorted(OPTIONS)) | TEXT)
        elif field.name == "layers":
            values["layers"] = draw(st.sampled_from(["", "external@3::4 full@0,-1"]))
        else:
            values[field.name] = draw(values_of(hints[field.name], field.metadata))
    return cls(**values)


def options_of(method: str) -> st.SearchStrategy[Any]:
    """Return a strategy for legal options of a method, built-in or external."""
    if method in OPTIONS:
        return trees(OPTIONS[method])
    return TABLES.map(lambda table: RawOptions(table=table))


@given(trees())
def test_dump_loads_back_equal(config: Config) -> None:
    assert parse(tomllib.loads(dump(config))) == config


def test_config_needs_no_torch() -> None:
    program = """
import sys
sys.modules["torch"] = None
from lcdist.config import load
print(load("configs/debug/full.toml").train.seqlen)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("256\n", "")
