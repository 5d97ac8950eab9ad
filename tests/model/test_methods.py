"""Every attention method inside the model: one function on every mesh, gradients included."""

import pytest

from lcdist.attention import METHODS
from lcdist.model.build import CausalLM
from lcdist.model.core_attention import LongContextAttention
from lcdist.model.init import whole_model_names
from tests.distributed import run_ranks
from tests.engines.internals import chunks_of
from tests.model.cases import Case, assert_same_gradients, results, tiers
from tests.model.small import Meshes, small

TP, PP, CP = (f"parallel.{axis}_size=2" for axis in ("tp", "pp", "cp"))
MESHES = [(TP, CP, "parallel.sequence_parallel=true"), (PP, CP), (TP, PP)]
# Small sizes, so that a row of 96 tokens has chunks, blocks and borders on every rank.
# Every first variant, and every other one after it, packs documents.
VARIANTS: dict[str, list[tuple[str, ...]]] = {
    "scca": [
        ("attention.chunk_size=20",),
        ("attention.pattern=flow", "attention.chunk_size=20"),
        ("attention.pattern=sda", "attention.dilation=3"),
        ("attention.pattern=sda_key",),
        ("attention.pattern=longmixed", "attention.chunk_size=20"),
        ("attention.pattern=s2", "attention.chunk_size=20"),
    ],
    "tensorized": [
        ("attention.modes=[6]",),
        ("attention.modes=[6]", "attention.hop_heads=kv", "attention.pe=global"),
        ("attention.modes=[3,4]", "attention.local_blocks=1"),
    ],
    "landmark": [
        ("attention.block_size=6",),
        ("attention.block_size=6",),
        ("attention.block_size=6", "attention.top_k=2", "attention.select_tokens=12"),
    ],
    "lssar": [("attention.power=3",)],
}
PACKED = ("data.documents=pack",)
MIXED = ("attention.layers=coca@1 lssar@-1", "attention.lssar.reweight=false")


def cases() -> list[Case]:
    """Every method with each of its variants on the meshes, and a model of several methods."""
    found = []
    for name in METHODS:
        method = f"attention.method={name}"
        for number, variant in enumerate(VARIANTS.get(name, [()])):
            packed = PACKED if number % 2 == 0 else ()
            shape = (method, *variant, *packed, "train.seqlen=96")
            found += [Case(4, mesh, shape) for mesh in MESHES]
    for mesh in ((PP, CP, "parallel.vp_size=2"), (TP, CP)):
        found.append(Case(4, mesh, (*MIXED, "train.seqlen=96"), samples=8))
    return found


CASES = cases()
# By default every variant on one mesh in turn, each method's first one on the mesh of three axes.
FIRST = {(name, *VARIANTS.get(name, [()])[0]) for name in METHODS}


def is_default(number: int, case: Case) -> bool:
    method, *variant = case.shape
    if not method.startswith("attention.method="):
        return True
    words = [word for word in variant if word.startswith("attention.")]
    if (method.removeprefix("attention.method="), *words) in FIRST:
        return case.mesh == MESHES[0]
    return case.mesh == MESHES[number // len(MESHES) % len(MESHES)]


TIERS = tiers([case for n, case in enumerate(CASES) if is_default(n, case)], CASES)


@pytest.mark.parametrize(("tier", "case"), TIERS)
def test_gradients_equal_those_of_one_process(tier: tuple[Case, ...], case: Case) -> None:
    assert_same_gradients(results(tier, 4)[case], results(tier, 1)[case.reference])


def methods_by_layer(rank: int, world_size: int, mesh: tuple[str, ...]) -> dict[str, str]:
    trainer = Meshes().trainer(small(*mesh, *MIXED, "train.global_batch_size=8"))
    return {
        whole_model_names(chunk)[name].split(".")[2]: module.method.name
        for chunk in chunks_of(trainer)
        for name, module in attention_modules(chunk)
    }


def attention_modules(chunk: CausalLM) -> list[tuple[str, LongContextAttention]]:
    """Each layer's attention, and the name of some parameter of that layer."""
    found = []
    for i, layer in enumerate(chunk.decoder.layers):
        core = layer.self_attention.core_attention
        found.append((f"decoder.layers.{i}.self_attention.linear_proj.weight", core))
    return found


@pytest.mark.parametrize("mesh", [(), (PP,), (PP, "parallel.vp_size=2")], ids=str)
def test_every_layer_has_its_own_method(mesh: tuple[str, ...]) -> None:
    expected = {"0": "full", "1": "coca", "2": "full", "3": "lssar"}
    ranks = run_ranks(methods_by_layer, 2 if mesh else 1, mesh)
    assert {layer: name for rank in ranks for layer, name in rank.items()} == expected
