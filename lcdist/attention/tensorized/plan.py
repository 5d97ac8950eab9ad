"""What travels in tensorized attention under context parallelism, and how much of it.

Shards are whole blocks of the product of modes. The coarsest mode is dealt out in units, an offset
inside a block and a key head each, so that ranks have equally many or one more, also where there
are more ranks than offsets. Branch 1 of more than one block reads a halo: the blocks before the
shard, from as many ranks back as they reach.
"""

from collections.abc import Sequence
from itertools import pairwise

from lcdist.attention.shape import HeadSlice, Shape, Traffic
from lcdist.config.schema import TensorizedOptions
from lcdist.exchange import Interval
from lcdist.layout import ContextLayout
from lcdist_kernels.tensorized import ModeGrid


def grid_of(options: TensorizedOptions, heads: HeadSlice, held: tuple[int, int]) -> ModeGrid:
    """The grid of `options` in a model of `heads`, for a tensor of `held` query and key heads.

    Raises ValueError where hop_heads joins heads of which the tensor holds only some.
    """
    group = heads.nheads // heads.nheads_kv
    hop_heads = options.hop_heads
    if hop_heads == "auto":
        hop_heads = "q" if group <= 2 else "kv"
    grid = ModeGrid(
        options.modes, options.local_blocks if options.modes else 1, options.pe, hop_heads
    )
    if grid.modes and hop_heads == "kv" and held[0] != group * held[1]:
        raise ValueError(
            f"hop_heads = {options.hop_heads!r}: hops take the mean over a group of {group} query "
            f"heads, of which this rank holds {held[0]}; use hop_heads = 'q', or a tp_size that "
            f"divides nheads_kv = {heads.nheads_kv}"
        )
    return grid


def unit_sizes(grid: ModeGrid, nheads_kv: int, cp_size: int) -> list[int]:
    """How many units of the coarsest mode each rank computes."""
    units = grid.block * nheads_kv
    borders = [units * rank // cp_size for rank in range(cp_size + 1)]
    return [stop - start for start, stop in pairwise(borders)]


def halo_plan(grid: ModeGrid, local_seqlen: int, cp_size: int) -> list[Interval]:
    """The tokens before each shard that branch 1 reads there, in order; none for one block."""
    plan = []
    reach = (grid.local_blocks - 1) * grid.block
    for dst in range(cp_size):
        start = dst * local_seqlen
        low = max(0, start - reach)
        for src in range(low // local_seqlen, dst):
            first = src * local_seqlen
            plan.append((src, dst, max(low - first, 0), local_seqlen))
    return plan


def halo_tokens(plan: Sequence[Interval], rank: int) -> int:
    """How many tokens `rank` receives."""
    return sum(stop - start for _, dst, start, stop in plan if dst == rank)


def plan_home(plan: Sequence[Interval]) -> list[Interval]:
    """The way home of what `plan` brought, in the same order, by places in the halo."""
    taken, home = {}, []
    for src, dst, start, stop in plan:
        first = taken.get(dst, 0)
        taken[dst] = first + stop - start
        home.append((dst, src, first, taken[dst]))
    return home


def traffic(options: TensorizedOptions, shape: Shape, layout: ContextLayout) -> Traffic:
    """Bytes each rank sends in one layer.

    Forward: q, k and U to the units and the partial back, out in the dtype of q, lse wide (fp32 or
    wider), and the halo of k and v. Backward: dout, lse and delta to the units, dq, dk and dU back,
    and the halo's gradients home, wide. cp_size = 1 sends nothing.
    """
    cp, wide = layout.cp_size, max(4, shape.itemsize)
    heads = shape.heads or HeadSlice(0, shape.nheads, 0, shape.nheads_kv)
    grid = grid_of(options, heads, (shape.nheads, shape.nheads_kv))
    group = shape.nheads // shape.nheads_kv
    hop_group = group if grid.modes and grid.hop_heads == "q" else 1
    row = shape.head_dim * shape.itemsize
    halo_row = 2 * shape.batch * shape.nheads_kv * shape.head_dim
    blocks = shape.batch * (layout.local_seqlen // grid.block)
    sizes, forward, backward = unit_sizes(grid, shape.nheads_kv, cp), [], []
    plan = halo_plan(grid, layout.local_seqlen, cp)
    for rank, units in enumerate(sizes):
        away = blocks * (sum(sizes) - units)  # units elsewhere, of blocks here
        home = blocks * (cp - 1) * units  # units here, of blocks elsewhere
        given = sum(stop - start for src, _, start, stop in plan if src == rank)
        taken = halo_tokens(plan, rank)
        forward.append(
            away * (group + 1 + hop_group) * row
            + home * group * (row + wide)
            + given * halo_row * shape.itemsize
        )
        backward.append(
            away * group * (row + 2 * wide)
            + home * (group + 1 + hop_group) * row
            + taken * halo_row * wide
        )
    return Traffic(tuple(forward), tuple(backward))
