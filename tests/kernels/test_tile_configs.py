"""Tile sizes for Hopper: every warpgroup has whole products of its own.

wgmma multiplies 64 rows at a time for the four warps of a warpgroup. Where a product has fewer than
16 rows a warp, Triton splits its columns over warpgroups: pieces of m64n32 that read both operands
from shared memory, and reductions across warpgroups, at two to three times the instructions.
"""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from lcdist_kernels.full import tile_configs as full
from lcdist_kernels.landmark import inner_loop
from lcdist_kernels.landmark import tile_configs as landmark
from lcdist_kernels.lssar import tile_configs as lssar
from lcdist_kernels.tensorized import ModeGrid
from lcdist_kernels.tensorized import launch as tensorized_launch
from lcdist_kernels.tensorized import tile_configs as tensorized
from lcdist_kernels.tensorized.sweeps import make_plan
from lcdist_kernels.triton_common import Launch, LaunchTable

HOMES = [full, landmark, lssar, tensorized]


def hopper_tables(home: ModuleType) -> Iterator[tuple[str, LaunchTable]]:
    """Yield (name, entries) of the tables of a method as Hopper reads them."""
    tables = {name: table for name, table in vars(home).items() if isinstance(table, dict)}
    tables = {name: table for name, table in tables.items() if name.isupper()}
    for name, table in tables.items():
        if not name.endswith("_HOPPER"):
            yield name, table | tables.get(f"{name}_HOPPER", {})
        elif name.removesuffix("_HOPPER") not in tables:
            yield name, table


def rows_of(home: ModuleType, name: str, launch: Launch) -> int:
    """Return rows of a kernel's products: queries, or keys where scores are transposed.

    Queries are rows in landmark's kernel for dk and dv too.
    """
    transposed = name.startswith("BWD_DKV") and home is not landmark
    return launch.block_n if transposed else launch.block_m


@pytest.mark.parametrize("home", HOMES, ids=lambda home: home.__name__.split(".")[-2])
def test_a_warp_has_sixteen_rows(home: ModuleType) -> None:
    tables = dict(hopper_tables(home))
    assert {"FWD", "BWD_DQ", "BWD_DKV"} <= set(tables)
    few = {
        (name, *key): launch
        for name, table in tables.items()
        for key, launch in table.items()
        if key[0] <= 128 and key[1] == 2
        if rows_of(home, name, launch) < 16 * launch.num_warps
    }
    assert not few


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose launches as on a GPU of compute capability 9."""
    monkeypatch.setattr("lcdist_kernels.triton_common.interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_launches_derived_for_blocks_and_fibres_keep_the_rule(head_dim: int) -> None:
    q = torch.empty(1, 8, 4, head_dim, dtype=torch.bfloat16)
    for tables in (landmark.FWD_TABLES, landmark.BWD_DQ_TABLES, landmark.BWD_DKV_TABLES):
        for size in (2, 51, 64, 128, 129, 256):
            launch = inner_loop.launch_for(tables, q, size)
            assert launch.block_m >= 16 * launch.num_warps, (size, launch)
    fit = tensorized_launch._fit_launch
    for size in (32, 64, 100, 512):
        sweep = tensorized_launch.Sweep(size, size, 1, 1, None, True)
        for table, entries in (
            (tensorized.FWD, tensorized.FWD_HOPPER),
            (tensorized.FWD, tensorized.FWD_FORK_HOPPER),
            (tensorized.BWD_DQ, tensorized.BWD_DQ_HOPPER),
        ):
            launch, _ = fit(table, q, sweep, entries)
            assert launch.block_m >= min(size, 16 * launch.num_warps), (size, launch)
        for entries in (tensorized.BWD_DKV_HOPPER, tensorized.BWD_DKV_HOP_HOPPER):
            launch, _ = fit(tensorized.BWD_DKV, q, sweep, entries, of_keys=True)
            assert launch.block_n >= min(size, 16 * launch.num_warps), (size, launch)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("seqlen", "modes"), [(32768, (512,)), (131072, (512,)), (32768, (32, 32))]
)
def test_tiles_of_short_fibres_have_128_rows(seqlen: int, modes: tuple[int, ...]) -> None:
    # 32 query heads, 4 a key head. Fibres of 64 or 32 tokens had tiles of as many rows.
    q, heads = torch.empty(1, 8, 32, 128, dtype=torch.bfloat16), 32
    for sweeps in make_plan(ModeGrid(modes, hop_heads="kv"), seqlen, None).sweeps:
        branch = sweeps.branch
        for table, entries in (
            (tensorized.FWD, tensorized.FWD_HOPPER),
            (tensorized.BWD_DQ, tensorized.BWD_DQ_HOPPER),
        ):
            launch, together = tensorized_launch._fit_launch(table, q, branch, entries, heads=4)
            assert (launch.block_m, launch.num_warps) == (128, 8)
            of_fibre = launch._replace(block_m=launch.block_m // together)
            programs = branch.programs(of_fibre) * heads // together
            assert programs == seqlen * heads // 128 <= 32768


def test_ampere_keeps_its_own_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcdist_kernels.triton_common.interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    q = torch.empty(1, 8, 4, 128, dtype=torch.bfloat16)
    assert inner_loop.launch_for(landmark.BWD_DKV_TABLES, q, 64) == landmark.BWD_DKV[128, 2]
    assert inner_loop.launch_for(landmark.BWD_DKV_TABLES, q, 128) == Launch(32, 128, 8, 1)
    assert inner_loop.launch_for(landmark.BWD_DKV_TABLES, q, 256) == landmark.BWD_DKV_LARGE[128, 2]
