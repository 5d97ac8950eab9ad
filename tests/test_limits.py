"""Absurd numbers are refused by the schema, and the plan answers what it lets through."""

import contextlib
import dataclasses
import tracemalloc
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from lcdist.attention.scca.shift_plan import _owned_spans, make_shift_plan
from lcdist.config import ConfigError, load, parse
from lcdist.config import rope as ropes
from lcdist.config.fields import Limit
from lcdist.config.schema import OPTIONS, Config, MixtureSource
from lcdist.config.values import MOST_ENTRIES, MOST_KEYS
from lcdist.hardware.gpu_specs import GPU_SPECS
from lcdist.plan import make_plan, plan_rows, smallest_world
from tests.test_config import errors_of, table, trees

ROPES = {cls.scaling: cls for cls in typing.get_args(ropes.Rope)}


def numbers(cls: type, path: str) -> Iterator[tuple[str, Any, bool]]:
    """Yield path, limit and whether it is a list, of every number of a dataclass of the schema."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], f"{path}{field.name}"
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from numbers(hint, f"{name}.")
        elif typing.get_origin(hint) is not typing.Literal:
            members = {hint, *typing.get_args(hint)}
            if members & {int, float}:
                is_list = typing.get_origin(hint) is tuple
                yield name, field.metadata.get("limit"), is_list


def every_number() -> list[tuple[str, Any, bool]]:
    found = [*numbers(Config, ""), *numbers(MixtureSource, "data.mixture.a.")]
    for method, options in OPTIONS.items():
        found += [(f"{method}:{path}", *rest) for path, *rest in numbers(options, "attention.")]
    for scaling, rope in ROPES.items():
        found += [(f"{scaling}:{path}", *rest) for path, *rest in numbers(rope, "model.rope.")]
    return found


@pytest.mark.parametrize(("name", "limit", "is_list"), every_number(), ids=lambda x: str(x)[:40])
def test_every_number_has_a_limit_with_unit_and_reason(
    name: str, limit: Limit | None, is_list: bool
) -> None:
    assert limit is not None, f"{name} has no limit"
    kind, _, path = name.rpartition(":")
    tag = {"attention": "method", "model": "scaling"}.get(path.split(".")[0], "")
    chosen = [f"{path.rpartition('.')[0]}.{tag}={kind}"] if kind else []
    beyond = limit.most + 1 if isinstance(limit.most, int) else limit.most * 1.001
    value = f"[{beyond!r}]" if is_list else repr(beyond)
    lines = errors_of(table(), *chosen, f"{path}={value}")
    [line] = [line for line in lines if line.startswith(path) and "must be at most" in line]
    assert limit.unit in line and line.endswith(f"({limit.reason})") and limit.reason


ABSURD = {
    "model.num_layers=1000000000": "at most 1,024 layers",
    "parallel.cp_size=1000000000": "at most 4,096 ranks",
    "train.seqlen=1000000000000000": "at most 1,073,741,824 tokens",
    "optim.lr=1e30": "at most 10 (beyond it training has no meaning)",
    "train.seed=1000000000000000000000000000": "at most 9,223,372,036,854,775,807",
    "parallel.stall=1e-9": "parallel.stall = 1e-09: must be at least 0.1",
    "evaluate.lengths=[8,1]": "evaluate.lengths[1] = 1: must be at least 2",
    "parallel.timeout=1e300": "at most 604,800 seconds, a week",
    "train.steps=0x"
    + "f" * 5000: "train.steps = a number with more digits than Python prints: must",
    "train.profile=0x" + "f" * 5000: "train.profile = a number with more digits",
    "log.folder=": "log.folder = '': name a folder",
    "log.folder=//": "log.folder = '//': is the root of the file system",
    "log.folder=runs/" + "x" * 300: "a name in it has 300 bytes, and file systems take 255",
    "log.folder=" + "x/" * 3000: "has 6000 bytes, and paths have at most 4095",
    'log.folder="a\\u0000b"': "log.folder = 'a\\x00b': holds a NUL character",
    "log.folder=a\udcff": "is not UTF-8",
    "data.mixture.a\udcff.path=x": "is not UTF-8",
    "train.seqlen=" + "[" * 5000: "the value is not TOML (it is nested too deeply)",
    "train.seqlen=" + "[" * 50 + "]" * 50: "it is nested in more than 16 levels",
    ".".join(["a"] * 5000) + "=1": "expected section.key=value",
    "data.long_from=[" + "1," * (MOST_ENTRIES + 1) + "]": f"at most {MOST_ENTRIES} are legal",
    "train.dtype=" + "x" * 10**6: "must be one of auto, fp32, bf16",
    "x" * 10**6 + ".y=1": "unknown key 'xxx",
}


@pytest.mark.parametrize("override", ABSURD, ids=lambda text: text[:30])
def test_absurd_values_are_refused_in_a_short_line(override: str) -> None:
    [line] = errors_of(table(), override)
    assert ABSURD[override] in line and len(line) < 400, line


FILES = {
    "dotted": ("model." + "a." * 20000 + "b = 1", "a key has more than 64 parts"),
    "levels": ("model." + "a." * 40 + "b = 1", "nested in more than 16 levels"),
    "lists": ("a = " + "[" * 10000, "nested too deeply"),
    "large": ("a = 1 # " + "x" * 2**20, "more than 1,048,576 bytes"),
    "bytes": (b"a = '\xff'", "not UTF-8"),
    "digits": ("a = " + "9" * 5000, "not TOML"),
}


@pytest.mark.parametrize("name", FILES)
def test_absurd_files_are_refused_by_name(name: str, tmp_path) -> None:
    content, message = FILES[name]
    file = tmp_path / "a.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=rf"a\.toml: .*{message}"):
        load(file)


def test_many_unknown_keys_are_counted() -> None:
    lines = errors_of(table(train={f"k{i}": i for i in range(100000)}))
    assert len(lines) == MOST_KEYS + 1 and lines[-1] == "99980 more unknown keys in train"


def test_limits_leave_room_for_what_is_trained() -> None:
    """The largest numbers of published models and clusters, and then some."""
    for words in (
        ["train.seqlen=100000000", "parallel.cp_size=2048", "train.steps=10000000"],
        ["model.num_layers=256", "model.hidden_size=65536", "model.vocab_size=1000000"],
        ["parallel.timeout=86400", "parallel.stall=0.5", "train.seed=18446744073709551"],
        ["optim.lr=1.0", "optim.weight_decay=1.0", "train.global_batch_size=65536"],
    ):
        parse(table(), words)


LARGEST = ["model.num_layers=32", "model.nheads=4096", "model.hidden_size=1048576"]
LARGEST += ["model.ffn_hidden_size=1048576", "train.seqlen=1073741824", "data.source=synthetic"]
FLOW = "attention.method=scca attention.pattern=flow"
LARGE = {
    "full": "model.num_layers=1024 parallel.cp_size=64 parallel.tp_size=8",
    "coca": "attention.method=coca parallel.cp_size=64",
    "lssar": "attention.method=lssar parallel.cp_size=64 parallel.layout=striped",
    "scca": "attention.method=scca attention.chunk_size=1",
    "scca on ranks": "attention.method=scca parallel.cp_size=8 attention.chunk_size=65536",
    "small chunks on ranks": "attention.method=scca parallel.cp_size=2 attention.chunk_size=1",
    "flow": f"{FLOW} model.num_layers=8",
    "flow on ranks": f"{FLOW} model.nheads=8 parallel.cp_size=4 model.num_layers=4 "
    "attention.chunk_size=1048576",
    "sda": "attention.method=scca attention.pattern=sda attention.dilation=65536 model.nheads=16",
    "sda on ranks": "attention.method=scca attention.pattern=sda parallel.cp_size=8 model.nheads=8",
    "sda_key": "attention.method=scca attention.pattern=sda_key parallel.cp_size=8 model.nheads=16",
    "tensorized": "attention.method=tensorized attention.modes=[1]",
    "halo": "attention.method=tensorized attention.local_blocks=1048576 parallel.cp_size=64",
    "long halo": "attention.method=tensorized attention.local_blocks=1073741824 "
    "parallel.cp_size=4096",
    "landmark": "attention.method=landmark attention.block_size=2",
    "top_k": "attention.method=landmark attention.block_size=2 attention.top_k=9 "
    "parallel.cp_size=64",
    "profile": "train.steps=1000000000 train.profile=1-1000000000",
}


@pytest.mark.parametrize("name", LARGE)
def test_the_plan_of_the_largest_numbers_takes_little_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists of tokens come from `arange`, whose memory tracemalloc does not see."""
    made, real = [0], torch.arange

    def arange(*bounds, **options):
        made[0] += len(range(*map(int, bounds)))
        return real(*bounds, **options)

    monkeypatch.setattr(torch, "arange", arange)
    config = parse(table(), [*LARGEST, *LARGE[name].split()])
    # What was imported or planned before does not count.
    _owned_spans.cache_clear()
    make_shift_plan.cache_clear()
    tracemalloc.start()
    try:
        plan_rows(make_plan(config, smallest_world(config), GPU_SPECS["h100"]))
    except ConfigError as error:
        [line] = error.errors
        assert "entries already, and at most" in line
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 32 * 2**20 and made[0] < 2**22, (peak, made)


@settings(max_examples=40)
@given(trees())
def test_a_plan_or_a_list_of_conflicts_answers_every_configuration(config: Config) -> None:
    with contextlib.suppress(ConfigError):
        plan_rows(make_plan(config, smallest_world(config), GPU_SPECS["h100"]))
