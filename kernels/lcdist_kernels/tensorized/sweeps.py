"""Sweeps of tensorized attention's kernels: fibres, a branch and a hop over them, and their tables.

A sweep of a whole sequence has a name of a few small values, under which its tables stay on the
device (`plans`): a warm call does nothing in proportion to the length.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lcdist_kernels.common import document_starts, wide_dtype
from lcdist_kernels.plans import cached_plan
from lcdist_kernels.tensorized.grid import ModeGrid, check_documents, initial_bias
from lcdist_kernels.tensorized.tiled import (
    Band,
    Branch,
    Fibres,
    coarsest_branch,
    fine_branch,
    past_band,
)
from lcdist_kernels.tile_ranges import (
    DeviceStream,
    band_of,
    bounded_below,
    device_stream,
    indices_of,
    key_ranges,
    on_device,
    query_ranges,
    send,
)
from lcdist_kernels.triton_common import Launch

NO_BLOCKS = torch.empty(0, dtype=torch.int64)


class SweepName(NamedTuple):
    """Names a sweep of a whole sequence: arguments of `make_plan`, a mode, and a field of its."""

    grid: ModeGrid
    seqlen: int
    documents: tuple[int, ...] | None
    mode: int
    kind: str


class SweepTables(NamedTuple):
    """Tables of a sweep on the device; None where a kernel needs none.

    Attributes:
        q_idx, q_lo, k_idx: limits of a branch within a fibre, int32.
        ranges: of the tiles of keys or of queries, see `tile_ranges`.
        blocks: blocks before, or after, each block; int32 `[outers]`.
        has_lo: whether q_lo hides any key.
    """

    q_idx: Tensor | None
    q_lo: Tensor | None
    k_idx: Tensor | None
    ranges: Tensor | None
    blocks: Tensor | None
    has_lo: bool


class Sweep(NamedTuple):
    """Fibres, the branch over them (None: no branch), and whether a hop runs along.

    Attributes:
        size_q, size_k: queries and keys of a fibre.
        stride: tokens from one to the next.
        outers: fibres of an offset in a sequence.
        before, after: whole blocks that a block's branch sees before its own, and blocks after its
            own that see it; empty where branches stay inside fibres.
        own_keys: whether the keys are the queries' own tokens, numbered from 0.
        name: of a sweep whose tables are kept.
    """

    size_q: int
    size_k: int
    stride: int
    outers: int
    band: Band | None
    hop: bool
    before: Tensor = NO_BLOCKS
    after: Tensor = NO_BLOCKS
    own_keys: bool = True
    name: SweepName | None = None

    @property
    def flags(self) -> dict[str, bool]:
        """Return the constants that kernels are compiled with."""
        return {"BRANCH": self.band is not None, "HOP": self.hop}

    @property
    def seqlen_k(self) -> int:
        """Return the keys of a sequence."""
        return self.outers * self.size_k * self.stride

    def programs(self, launch: Launch, of_keys: bool = False) -> int:
        """Return the tiles of all fibres of a sequence, of queries or of keys."""
        size, block = (self.size_k, launch.block_n) if of_keys else (self.size_q, launch.block_m)
        return triton.cdiv(size, block) * self.stride * self.outers

    def tables(self, launch: Launch, place: DeviceStream, of_keys: bool) -> SweepTables:
        """Return the tables of a kernel that owns queries, or keys."""
        rest = (launch.block_m, launch.block_n, of_keys, place)
        return make_tables(self, *rest) if self.name is None else named_tables(self.name, *rest)


def make_tables(
    sweep: Sweep, block_m: int, block_n: int, of_keys: bool, place: DeviceStream
) -> SweepTables:
    """Return the tables of a sweep for tiles of block_m queries and block_n keys."""
    if sweep.band is None:
        return SweepTables(None, None, None, None, None, False)
    band = band_of(*sweep.band)
    has_lo, blocks = bounded_below(band), sweep.after if of_keys else sweep.before
    return SweepTables(
        on_device(band.q_idx, place),
        on_device(band.q_lo, place) if has_lo else None,
        None if sweep.own_keys else on_device(band.k_idx, place),
        (query_ranges if of_keys else key_ranges)(band, block_m, block_n, place),
        on_device(indices_of(blocks), place) if blocks.any() else None,
        has_lo,
    )


@cached_plan
def named_tables(
    name: SweepName, block_m: int, block_n: int, of_keys: bool, place: DeviceStream
) -> SweepTables:
    """Return `make_tables` of the sweep with this name."""
    plan = make_plan(name.grid, name.seqlen, name.documents)
    sweep = getattr(plan.sweeps[name.mode], name.kind)
    return make_tables(sweep, block_m, block_n, of_keys, place)


def sweep_of(
    seqlen: int, seqlen_k: int, branch: Branch | None, hop: Fibres | None, own_keys: bool = True
) -> Sweep:
    """Return the sweep of a branch and a hop of the same mode.

    A branch over a run of tokens is cut into the hop's fibres; blocks that it sees before them are
    counted in units of a fibre.
    """
    if branch is None:
        assert hop is not None, "a sweep has a branch or a hop"
        outers = seqlen // (hop.size * hop.stride)
        return Sweep(hop.size, hop.size, hop.stride, outers, None, True)
    if branch.fibres is not None:
        size, stride = branch.fibres.size, branch.fibres.stride
        return Sweep(size, size, stride, seqlen // (size * stride), branch.band, hop is not None)
    if hop is None:
        return Sweep(seqlen, seqlen_k, 1, 1, branch.band, False, own_keys=own_keys)
    size, outers = hop.size, seqlen // hop.size
    first, lo = (x[::size].contiguous() for x in branch.band[:2])
    after = torch.searchsorted(lo, first, right=True) - 1 - torch.arange(outers)
    return Sweep(size, size, 1, outers, past_band(size, 0), True, (first - lo) // size, after)


class ModeSweeps(NamedTuple):
    """Sweeps of a mode: its branch, its hop, and both; without a hop after the coarsest."""

    branch: Sweep
    hop: Sweep | None
    both: Sweep


class WholePlan(NamedTuple):
    """Branches and sweeps of a whole sequence, finest mode first.

    positions: of tokens in their documents, int64 on the CPU, padded to whole blocks.
    """

    positions: Tensor
    branches: list[Branch]
    sweeps: list[ModeSweeps]


@cached_plan
def make_plan(grid: ModeGrid, seqlen: int, documents: tuple[int, ...] | None) -> WholePlan:
    """Plan the attention of a sequence, padded to whole blocks.

    Raise ValueError if a document starts inside a block.
    """
    index = torch.arange(seqlen + -seqlen % grid.block)
    borders = None if documents is None else torch.tensor(documents)
    starts = document_starts(borders, index, seqlen)
    # Padding continues the last document, also past an empty one.
    starts[seqlen:] = starts[seqlen - 1]
    check_documents(starts, grid)
    modes = range(len(grid.modes))
    branches = [fine_branch(mode, index, starts, index, grid) for mode in modes]
    branches.append(coarsest_branch(starts, grid))
    sweeps = []
    for mode, branch in enumerate(branches):
        hop = Fibres(grid.modes[mode], grid.strides[mode]) if mode in modes else None
        parts = {"branch": (branch, None), "hop": (None, hop), "both": (branch, hop)}
        made = {
            kind: sweep_of(len(index), len(index), *part)._replace(
                name=SweepName(grid, seqlen, documents, mode, kind)
            )
            for kind, part in parts.items()
            if any(part)
        }
        sweeps.append(ModeSweeps(made["branch"], made.get("hop"), made["both"]))
    return WholePlan(index - starts, branches, sweeps)


@cached_plan
def mode_angles(
    grid: ModeGrid, seqlen: int, documents: tuple[int, ...] | None, place: DeviceStream
) -> tuple[Tensor, ...]:
    """Return what each mode rotates the tokens of a plan by, on the device: int32 `[s]`."""
    positions = make_plan(grid, seqlen, documents).positions
    modes = range(len(grid.modes) + 1)
    return tuple(send(grid.angle(positions, mode).to(torch.int32), place) for mode in modes)


def initial_bias_for(q: Tensor, modes: tuple[int, ...]) -> Tensor:
    """Return `initial_bias` on the device of q `[b, s, h, d]`, shared by all calls: never write."""
    return _sent_bias(modes, q.shape[2], wide_dtype(q.dtype), device_stream(q))


@cached_plan
def _sent_bias(
    modes: tuple[int, ...], nheads: int, dtype: torch.dtype, place: DeviceStream
) -> Tensor:
    return send(initial_bias(modes, nheads).to(dtype), place)
