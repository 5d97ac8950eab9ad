"""Every experiment in configs/ loads and plans: a rename in the schema leaves none behind."""

import tomllib
from pathlib import Path

import pytest

from lcdist.config import load
from lcdist.plan import make_plan, smallest_world

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))
DEBUG = sorted((ROOT / "configs" / "debug").glob("*.toml"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_it_loads_and_plans_on_its_smallest_world(path: Path) -> None:
    config = load(path)
    plan = make_plan(config, smallest_world(config))
    assert plan.seqlen >= config.train.seqlen and plan.dp_size == 1


@pytest.mark.parametrize("path", DEBUG, ids=name)
def test_a_debug_config_sets_what_others_replace_one_key_a_line(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    raw = tomllib.loads(text)
    lines = [line.strip() for line in text.splitlines()]
    assert f"seqlen = {raw['train']['seqlen']}" in lines
    assert f'method = "{raw["attention"]["method"]}"' in lines
    keys = sum(len(section) for section in raw.values())
    assert keys == sum("=" in line for line in lines if not line.startswith("#"))


def test_there_is_a_debug_config_for_each_method_it_is_named_after() -> None:
    assert DEBUG and {p.stem: load(p).attention.method for p in DEBUG} == {
        p.stem: p.stem for p in DEBUG
    }
