"""gather: all shards, or the blocks a rank names.

The adjoint of the first is a reduce-scatter; of the second, every rank's gradients go home and are
added there in rank order, so that two runs give the same bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lcdist.exchange.debug import Label
from lcdist.exchange.p2p import (
    Group,
    all_gather,
    group_rank,
    group_size,
    reduce_scatter,
    trade,
    wider,
)
from lcdist.exchange.pending import Arrival, Pending, Post


def gather(
    x: Tensor,
    group: Group,
    dim: int = 1,
    blocks: Sequence[int] | Tensor | None = None,
    block_size: int | None = None,
    wide: bool = False,
) -> Pending:
    """All ranks' `x` concatenated along `dim` in rank order; or, of that, the `blocks` asked for.

    x: the same shape and dtype on all ranks. blocks: block numbers of the whole, each of
    `block_size` entries along `dim`, in any order, with repeats, maybe none; each rank asks for
    its own, and a block is sent once to a rank that asks for it twice. Gives the blocks one after
    the other in the order asked. wide: give blocks in the wider of fp32 and x.dtype, so that their
    gradients come home unrounded; what is sent forward stays in x.dtype.

    With `blocks` the requests are exchanged first and waited for: n + asked numbers of 8 bytes to
    each peer, counted as gather's. Raises ValueError for a block that does not exist, and where
    `block_size` does not divide the shard.
    """
    dim %= x.dim()
    if blocks is None:
        return Pending(x, *_whole(x, group, dim))
    if block_size is None or block_size < 1 or x.shape[dim] % block_size:
        raise ValueError(
            f"gather: block_size = {block_size} must divide the shard's {x.shape[dim]} entries"
        )
    asked = blocks.tolist() if isinstance(blocks, Tensor) else list(blocks)
    desk = _Desk(x, group, dim, block_size, asked)
    if not wide:
        return Pending(x, desk.out, desk.home)

    def widened(x: Tensor) -> Arrival:
        arrive = desk.out(x)
        return lambda: arrive().to(wider(x.dtype))

    return Pending(x, widened, desk.home)


def _whole(x: Tensor, group: Group, dim: int) -> tuple[Post, Post]:
    n, shape = group_size(group), x.shape

    def forward(x: Tensor) -> Arrival:
        if n == 1:
            return lambda: x.detach()
        out = x.new_empty((n, *shape))
        handle = all_gather(group, _label("forward", shape, x.dtype), x.contiguous(), out)

        def arrive() -> Tensor:
            handle.wait()
            return out.movedim(0, dim).flatten(dim, dim + 1)

        return arrive

    def adjoint(dout: Tensor) -> Arrival:
        if n == 1:
            return lambda: dout
        parts = dout.unflatten(dim, (n, shape[dim])).movedim(dim, 0)
        parts = parts.to(wider(dout.dtype)).contiguous()
        dx = parts.new_empty(shape)
        handle = reduce_scatter(group, _label("backward", shape, dx.dtype), parts, dx)

        def arrive() -> Tensor:
            handle.wait()
            return dx.to(dout.dtype)

        return arrive

    return forward, adjoint


def _label(step: str, shape: Sequence[int], dtype: torch.dtype) -> Label:
    return Label("gather", step, tuple(shape), dtype)


class _Desk:
    """Who asked for which of whose blocks; rows are blocks, flattened."""

    def __init__(
        self, x: Tensor, group: Group, dim: int, block_size: int, asked: list[int]
    ) -> None:
        self.group, self.dim, self.shape = group, dim, x.shape
        self.num_local = x.shape[dim] // block_size
        self.width = x.numel() // self.num_local if self.num_local else 0
        self.entries = len(asked) * block_size
        num_blocks = self.num_local * group_size(group)
        for block in asked:
            if not 0 <= block < num_blocks:
                raise ValueError(f"gather: block {block} asked for, there are {num_blocks}")
        # Sorted, so that they are grouped by owner, in rank order.
        wanted = sorted(set(asked))
        place = {block: row for row, block in enumerate(wanted)}
        self.rows = torch.tensor([place[b] for b in asked], dtype=torch.int64, device=x.device)
        self.num_wanted = len(wanted)
        self.wanted_of: dict[int, list[int]] = {}
        for block in wanted:
            owner, local = divmod(block, self.num_local)
            self.wanted_of.setdefault(owner, []).append(local)
        self.asked_of_me = self._requests(x.device)

    def _requests(self, device: torch.device) -> dict[int, Tensor]:
        """The local blocks that each rank wants of this one, by rank in rank order."""
        n, me = group_size(self.group), group_rank(self.group)
        wanted = {
            owner: torch.tensor(local, dtype=torch.int64, device=device)
            for owner, local in self.wanted_of.items()
        }
        if n == 1:
            return wanted
        counts = [len(self.wanted_of.get(owner, ())) for owner in range(n)]
        mine = torch.tensor(counts, dtype=torch.int64, device=device)
        everyone = mine.new_empty((n, n))
        all_gather(self.group, _label("counts", self.shape, mine.dtype), mine, everyone).wait()
        of_me = {rank: int(c) for rank, c in enumerate(everyone[:, me].tolist()) if c}
        sizes = {rank: [count] for rank, count in of_me.items()}
        label = _label("requests", self.shape, mine.dtype)
        arrived = trade(self.group, label, wanted, sizes, mine)()
        return {rank: arrived[rank] for rank in sorted(arrived)}

    def out(self, x: Tensor) -> Arrival:
        local = x.movedim(self.dim, 0).reshape(self.num_local, self.width)
        outgoing = {rank: local[rows].contiguous() for rank, rows in self.asked_of_me.items()}
        incoming = {owner: (len(rows), self.width) for owner, rows in self.wanted_of.items()}
        label = _label("forward", self.shape, x.dtype)
        arrive = trade(self.group, label, outgoing, incoming, local)

        def order() -> Tensor:
            boxes = arrive()
            wanted = [boxes[owner] for owner in sorted(boxes)]
            rows = torch.cat(wanted)[self.rows] if wanted else local.new_empty((0, self.width))
            out = rows.reshape(self.entries, *self._rest()).movedim(0, self.dim)
            return out.contiguous()

        return order

    def home(self, dout: Tensor) -> Arrival:
        drows = dout.movedim(self.dim, 0).reshape(len(self.rows), self.width).contiguous()
        wanted = _add_rows(drows, self.rows, self.num_wanted)
        sizes = [len(rows) for rows in self.wanted_of.values()]
        outgoing = dict(zip(self.wanted_of, wanted.split(sizes), strict=True)) if sizes else {}
        incoming = {rank: (len(rows), self.width) for rank, rows in self.asked_of_me.items()}
        label = _label("backward", self.shape, dout.dtype)
        arrive = trade(self.group, label, outgoing, incoming, wanted)

        def add() -> Tensor:
            boxes = arrive()
            dlocal = dout.new_zeros((self.num_local, self.width), dtype=wider(dout.dtype))
            # One rank's rows are distinct: this adds in rank order, on CUDA too.
            for rank, rows in self.asked_of_me.items():
                dlocal.index_add_(0, rows, boxes[rank].to(dlocal.dtype))
            dx = dlocal.to(dout.dtype).reshape(self.shape[self.dim], *self._rest())
            return dx.movedim(0, self.dim)

        return add

    def _rest(self) -> list[int]:
        return [size for d, size in enumerate(self.shape) if d != self.dim]


def _add_rows(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """`rows` added up by `index`, in their order: of the operators that add, index_add_ does so on
    a CPU and index_put_, which sorts, on CUDA."""
    if len(rows) == num_rows:
        return torch.empty_like(rows).index_copy_(0, index, rows)
    out = rows.new_zeros((num_rows, rows.shape[1]), dtype=wider(rows.dtype))
    wide = rows.to(out.dtype)
    summed = (
        out.index_put_((index,), wide, accumulate=True)
        if rows.is_cuda
        else out.index_add_(0, index, wide)
    )
    return summed.to(rows.dtype)
