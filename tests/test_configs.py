"""Every experiment in configs/ loads and plans: a rename in the schema leaves none behind.

The recipes, those for GPUs, also keep to what configs/README.md says of them: its table is made
from their plans.
"""

import re
import shlex
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lcdist.commands.main import parse_words
from lcdist.config import load
from lcdist.config.rope import RopePlain
from lcdist.config.schema import Config, ModelConfig
from lcdist.hardware.gpu_specs import GPU_SPECS
from lcdist.plan import Plan, make_plan, smallest_world
from lcdist.rundir.source import load_run

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))
DEBUG = sorted((ROOT / "configs" / "debug").glob("*.toml"))
FOLDERS = ("1b", "7b", "8b", "70b")
RECIPES = [path for folder in FOLDERS for path in CONFIGS if path.parent.name == folder]
README = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")

NODE = 8
GIB = 2**30
# Of 80 GB: what half the tensor-parallel ranks would need at least.
LESS_BYTES = 45 * GIB
H100 = GPU_SPECS["h100"]
# From here tensor parallelism takes the node and context parallelism goes over nodes.
LONG = 131_072


@dataclass(frozen=True)
class Published:
    """A model as its config.json has it. seqlen: what it was trained to read, in tokens."""

    model: ModelConfig
    seqlen: int


def published(
    vocab: int, layers: int, hidden: int, heads: tuple[int, int], ffn: int, **more: Any
) -> ModelConfig:
    """Return a model; heads: of queries and of keys, 0: as many."""
    sizes = {"num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": ffn}
    return ModelConfig(vocab_size=vocab, nheads=heads[0], nheads_kv=heads[1], **sizes, **more)


PUBLISHED = {
    "llama-3.2-1b": Published(
        published(128256, 16, 2048, (32, 8), 8192, tied_embeddings=True), 131_072
    ),
    "llama-2-7b": Published(published(32000, 32, 4096, (32, 0), 11008), 4096),
    "llama-3-8b": Published(published(128256, 32, 4096, (32, 8), 14336), 8192),
    "llama-3-70b": Published(published(128256, 80, 8192, (64, 8), 28672), 8192),
}
# These begin with a run of lcdist's, and with nothing.
OWN = {"7b/extend-128k.toml": "llama-2-7b", "7b/pretrain.toml": "llama-2-7b"}


def name(path: Path) -> str:
    return path.relative_to(ROOT / "configs").as_posix()


def gpus(path: Path) -> int:
    [count] = re.findall(r"^# GPUs: (\d+) of 80 GB, ", path.read_text(encoding="utf-8"), re.M)
    return int(count)


def begins_with(path: Path) -> str:
    """Return the published model of a recipe."""
    return OWN.get(name(path)) or next(
        word
        for word in sorted(PUBLISHED, key=len, reverse=True)
        if load_run(path)[0].config.checkpoint.load in (f"runs/{word}", f"runs/{word}-landmark")
    )


@cache
def plans(path: Path) -> dict[str, Plan]:
    """Plan each stage for H100 GPUs."""
    world = gpus(path)
    return {stage.name: make_plan(stage.config, world, H100) for stage in load_run(path)}


def tokens_a_step(config: Config) -> int:
    return config.train.global_batch_size * config.train.seqlen


def table() -> str:
    """Every recipe and stage, a row each."""
    heads = ["recipe", "stage", "GPUs", "dp x pp x cp x tp", "tokens a sample", "tokens a step"]
    heads += ["steps", "tokens, 10⁹", "work, 10¹⁸ FLOP", "GiB a GPU", "GiB of its host"]
    lines = [heads, ["---"] * len(heads)]
    for path in RECIPES:
        for stage, plan in plans(path).items():
            config, mesh = plan.config, plan.config.parallel
            tokens = tokens_a_step(config) * config.train.steps
            lines.append(
                [
                    f"[{name(path)}]({name(path)})",
                    stage,
                    str(plan.world_size),
                    f"{plan.dp_size} x {mesh.pp_size} x {mesh.cp_size} x {mesh.tp_size}",
                    f"{config.train.seqlen:,}",
                    f"{tokens_a_step(config):,}",
                    f"{config.train.steps:,}",
                    f"{tokens / 1e9:.2f}",
                    f"{tokens * plan.compute.flops_per_token / 1e18:,.0f}",
                    f"{plan.memory.device_bytes / GIB:.1f}",
                    f"{plan.memory.host_bytes / GIB:.1f}",
                ]
            )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_it_loads_and_plans_on_its_smallest_world(path: Path) -> None:
    for stage in load_run(path):
        plan = make_plan(stage.config, smallest_world(stage.config))
        assert plan.shape.seqlen >= stage.config.train.seqlen and plan.dp_size == 1


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


def test_the_readme_has_every_recipe_as_it_is_planned() -> None:
    assert table() in README, f"the table of configs/README.md should be\n\n{table()}"


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_fits_the_gpus_it_is_for(path: Path) -> None:
    for plan in plans(path).values():
        assert plan.dtype == "bf16" and (plan.world_size == 1 or plan.world_size % NODE == 0)
        assert plan.memory.device_bytes <= plan.memory.usable_bytes
        assert plan.shape.seqlen == plan.config.train.seqlen, "no token of padding"


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_tensor_parallelism_is_the_least_that_fits_or_the_node(path: Path) -> None:
    for plan in plans(path).values():
        mesh = plan.config.parallel
        assert mesh.tp_size <= NODE and mesh.sequence_parallel == (mesh.tp_size > 1)
        if mesh.tp_size == 1 or plan.config.train.seqlen >= LONG:
            assert mesh.tp_size in (1, NODE)
            continue
        half = replace(mesh, tp_size=mesh.tp_size // 2, sequence_parallel=mesh.tp_size > 2)
        wider = replace(plan.config, parallel=half)
        assert make_plan(wider, plan.world_size, H100).memory.device_bytes > LESS_BYTES


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_the_model_is_the_published_one(path: Path) -> None:
    published = PUBLISHED[begins_with(path)].model
    landmark = {plan.config.attention.method == "landmark" for plan in plans(path).values()}
    for plan in plans(path).values():
        model = plan.config.model
        assert replace(model, rope=published.rope) == replace(
            published, vocab_size=published.vocab_size + (landmark == {True})
        )


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_stages_rotation_reaches_as_far_as_its_samples(path: Path) -> None:
    for plan in plans(path).values():
        config, rope = plan.config, plan.config.model.rope
        known = PUBLISHED[begins_with(path)].seqlen
        original, seqlen = getattr(rope, "original_seqlen", known), config.train.seqlen
        if config.attention.method == "tensorized":
            # Distances are counted in tokens of a block, and in blocks.
            [block], near = config.attention.options.modes, config.attention.options.local_blocks
            seqlen = max(near * block, seqlen // block)
        if isinstance(rope, RopePlain) and seqlen > known:
            # The least base for a length (arXiv:2405.14591, figure 1).
            assert rope.base >= 0.0424 * seqlen**1.628
        else:
            assert original * getattr(rope, "factor", 1.0) >= seqlen


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_stages_become_longer_and_read_other_samples(path: Path) -> None:
    configs = [plan.config for plan in plans(path).values()]
    lengths = [config.train.seqlen for config in configs]
    assert lengths == sorted(set(lengths))
    assert len({config.train.seed for config in configs}) == len(configs)
    assert configs[-1].evaluate.lengths[-1] in (lengths[-1], 8192)
    for config, stage in zip(configs, plans(path), strict=True):
        assert stage in ("", f"{config.train.seqlen // 1024}k")
        if config.attention.method == "scca":
            assert config.attention.options.chunk_size * 4 == config.train.seqlen


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_what_it_starts_from_is_made_as_it_says(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"^# Start from the result of: (.*)$", text, re.M)
    assert bool(found) == (name(path) not in OWN)
    config = load_run(path)[0].config
    known = PUBLISHED[begins_with(path)].model.vocab_size
    for command in found:
        arguments = parse_words(shlex.split(command)[1:])
        assert arguments.out.as_posix() == config.checkpoint.load
        assert arguments.extra_tokens == config.model.vocab_size - known
        assert not arguments.overrides


def test_the_readmes_commands_can_be_given() -> None:
    commands = re.findall(r"^\.venv/bin/lcdist (.*)$", README, re.M)
    assert commands
    for command in commands:
        arguments = parse_words(shlex.split(command))
        if hasattr(arguments, "config"):
            for stage in load_run(ROOT / arguments.config, arguments.overrides):
                make_plan(stage.config, arguments.world_size)


def test_every_link_of_the_readme_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links and not [
        link for link in links if "://" not in link and not (ROOT / "configs" / link).exists()
    ]
