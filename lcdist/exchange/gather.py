"""gather: collect all ranks' shards, or only the blocks that a rank requests.

The adjoint of a whole gather is a reduce-scatter. The adjoint of a gather by blocks sends every
gradient to the block's owner. The owner adds them in rank order, so that two runs give the same
bits.
"""

from collections.abc import Callable, Mapping, Sequence, Sized

import torch
from torch import Tensor

from lcdist.exchange.debug import Label
from lcdist.exchange.p2p import (
    Group,
    all_gather,
    exchange_by_peer,
    group_rank,
    group_size,
    reduce_scatter,
    wide_dtype,
)
from lcdist.exchange.pending import Pending, PostFn, WaitFn


def gather(
    x: Tensor,
    group: Group,
    dim: int = 1,
    blocks: Sequence[int] | Tensor | None = None,
    block_size: int | None = None,
    wide: bool = False,
) -> Pending:
    """Concatenate all ranks' `x` along `dim` in rank order, or fetch some `blocks` of that.

    With `blocks`, the requests are exchanged first and waited for. They send n + len(blocks)
    numbers of 8 bytes to each peer, counted as gather traffic. A block requested twice by one rank
    is sent to it once.

    Args:
        x: this rank's shard, with the same shape and dtype on all ranks.
        group: context-parallel group.
        dim: dimension to concatenate along.
        blocks: block numbers in the whole tensor, in any order, with repeats, possibly none; each
            rank passes its own. The result holds the blocks in the order requested.
        block_size: entries of a block along `dim`; must divide the shard.
        wide: return blocks in the wider of fp32 and x.dtype, so that their gradients return
            unrounded; the forward messages stay in x.dtype.

    Raises:
        ValueError: a block does not exist, or `block_size` does not divide the shard.
    """
    dim %= x.dim()
    if blocks is None:
        return Pending(x, *_whole_gather(x, group, dim))
    if block_size is None or block_size < 1 or x.shape[dim] % block_size:
        raise ValueError(
            f"gather: block_size = {block_size} must divide the shard's {x.shape[dim]} entries"
        )
    requested = blocks.tolist() if isinstance(blocks, Tensor) else list(blocks)
    requests = _BlockRequests(x, group, dim, block_size, requested)
    if not wide:
        return Pending(x, requests.send_blocks, requests.return_gradients)

    def send_blocks(x: Tensor) -> WaitFn:
        receive = requests.send_blocks(x)
        return lambda: receive().to(wide_dtype(x.dtype))

    return Pending(x, send_blocks, requests.return_gradients)


def _whole_gather(x: Tensor, group: Group, dim: int) -> tuple[PostFn, PostFn]:
    """Return the all-gather of shards like `x` and its adjoint, a reduce-scatter."""
    n, shape = group_size(group), x.shape

    def forward(x: Tensor) -> WaitFn:
        if n == 1:
            return lambda: x.detach()
        out = x.new_empty((n, *shape))
        handle = all_gather(group, _label("forward", shape, x.dtype), x.contiguous(), out)

        def receive() -> Tensor:
            handle.wait()
            return out.movedim(0, dim).flatten(dim, dim + 1)

        return receive

    def adjoint(dout: Tensor) -> WaitFn:
        if n == 1:
            return lambda: dout
        parts = dout.unflatten(dim, (n, shape[dim])).movedim(dim, 0)
        parts = parts.to(wide_dtype(dout.dtype)).contiguous()
        dx = parts.new_empty(shape)
        handle = reduce_scatter(group, _label("backward", shape, dx.dtype), parts, dx)

        def receive() -> Tensor:
            handle.wait()
            return dx.to(dout.dtype)

        return receive

    return forward, adjoint


def _label(step: str, shape: Sequence[int], dtype: torch.dtype) -> Label:
    return Label("gather", step, tuple(shape), dtype)


class _BlockRequests:
    """All ranks' block requests, seen from one rank. Blocks are flattened to rows.

    Args:
        x: this rank's shard.
        group: context-parallel group.
        dim: dimension of `x` that is cut into blocks.
        block_size: entries of a block along `dim`.
        requested: global numbers of the blocks that this rank wants, in output order.
    """

    def __init__(
        self, x: Tensor, group: Group, dim: int, block_size: int, requested: list[int]
    ) -> None:
        self.group, self.dim, self.shape = group, dim, x.shape
        self.num_local = x.shape[dim] // block_size
        self.row_size = x.numel() // self.num_local if self.num_local else 0
        self.num_entries = len(requested) * block_size
        num_blocks = self.num_local * group_size(group)
        for block in requested:
            if not 0 <= block < num_blocks:
                raise ValueError(f"gather: block {block} requested, but there are {num_blocks}")
        # Sorted, so that blocks are grouped by owner, in rank order.
        unique = sorted(set(requested))
        row_of_block = {block: row for row, block in enumerate(unique)}
        self.num_unique = len(unique)
        # Local block numbers to receive, by owner.
        self.recv_blocks: dict[int, list[int]] = {}
        for block in unique:
            owner, local_block = divmod(block, self.num_local)
            self.recv_blocks.setdefault(owner, []).append(local_block)
        self.output_rows, counts, outgoing = self._numbers_on_device(
            [row_of_block[b] for b in requested], x.device
        )
        self.send_blocks_by_rank = self._exchange_requests(counts, outgoing)

    def _numbers_on_device(
        self, output_rows: list[int], device: torch.device
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Return, sent in one copy, numbers that depend on the request, all int64.

        They are the row among the unique blocks of each requested one, how many blocks are
        requested of each rank, and which, by owner.
        """
        counts = [len(self.recv_blocks.get(owner, ())) for owner in range(group_size(self.group))]
        parts = [output_rows, counts, *self.recv_blocks.values()]
        numbers = torch.tensor([number for part in parts for number in part], dtype=torch.int64)
        rows, counted, *blocks = numbers.to(device).split([len(part) for part in parts])
        return rows, counted, dict(zip(self.recv_blocks, blocks, strict=True))

    def _exchange_requests(self, counts: Tensor, outgoing: dict[int, Tensor]) -> dict[int, Tensor]:
        """Return the local blocks that each rank requests from this one, in rank order."""
        n, rank = group_size(self.group), group_rank(self.group)
        if n == 1:
            return outgoing
        all_counts = counts.new_empty((n, n))
        label = _label("counts", self.shape, counts.dtype)
        all_gather(self.group, label, counts, all_counts).wait()
        incoming = {
            peer: [int(count)] for peer, count in enumerate(all_counts[:, rank].tolist()) if count
        }
        label = _label("requests", self.shape, counts.dtype)
        received = exchange_by_peer(self.group, label, outgoing, incoming, counts)()
        return {peer: received[peer] for peer in sorted(received)}

    def send_blocks(self, x: Tensor) -> WaitFn:
        """Post the blocks that other ranks requested; the wait returns this rank's own request."""
        local = x.movedim(self.dim, 0).reshape(self.num_local, self.row_size)
        outgoing = {
            rank: local[blocks].contiguous() for rank, blocks in self.send_blocks_by_rank.items()
        }
        receive_rows = self._post("forward", outgoing, self.recv_blocks, local)

        def receive() -> Tensor:
            by_owner = receive_rows()
            unique = [by_owner[owner] for owner in sorted(by_owner)]
            rows = (
                torch.cat(unique)[self.output_rows]
                if unique
                else local.new_empty((0, self.row_size))
            )
            out = rows.reshape(self.num_entries, *self._other_sizes()).movedim(0, self.dim)
            return out.contiguous()

        return receive

    def return_gradients(self, dout: Tensor) -> WaitFn:
        """Post the blocks' gradients to their owners; the wait returns the gradient of `x`."""
        rows = dout.movedim(self.dim, 0).reshape(len(self.output_rows), self.row_size).contiguous()
        unique = _sum_rows(rows, self.output_rows, self.num_unique)
        sizes = [len(blocks) for blocks in self.recv_blocks.values()]
        outgoing = dict(zip(self.recv_blocks, unique.split(sizes), strict=True)) if sizes else {}
        receive_rows = self._post("backward", outgoing, self.send_blocks_by_rank, unique)

        def receive() -> Tensor:
            by_rank = receive_rows()
            dlocal = dout.new_zeros((self.num_local, self.row_size), dtype=wide_dtype(dout.dtype))
            # The blocks of one rank are distinct, so this adds in rank order, also on CUDA.
            for rank, blocks in self.send_blocks_by_rank.items():
                dlocal.index_add_(0, blocks, by_rank[rank].to(dlocal.dtype))
            dx = dlocal.to(dout.dtype).reshape(self.shape[self.dim], *self._other_sizes())
            return dx.movedim(0, self.dim)

        return receive

    def _post(
        self, step: str, outgoing: Mapping[int, Tensor], expected: Mapping[int, Sized], like: Tensor
    ) -> Callable[[], Mapping[int, Tensor]]:
        """Post rows to ranks; the function waits for those of the blocks `expected` by rank."""
        incoming = {rank: (len(blocks), self.row_size) for rank, blocks in expected.items()}
        label = _label(step, self.shape, like.dtype)
        return exchange_by_peer(self.group, label, outgoing, incoming, like)

    def _other_sizes(self) -> list[int]:
        return [size for d, size in enumerate(self.shape) if d != self.dim]


def _sum_rows(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Return `num_rows` rows; row i is the sum, in order, of the `rows` whose `index` is i.

    Two operators give a reproducible order: index_add_ on a CPU, and index_put_, which sorts, on
    CUDA.
    """
    if len(rows) == num_rows:
        return torch.empty_like(rows).index_copy_(0, index, rows)
    out = rows.new_zeros((num_rows, rows.shape[1]), dtype=wide_dtype(rows.dtype))
    wide_rows = rows.to(out.dtype)
    total = (
        out.index_put_((index,), wide_rows, accumulate=True)
        if rows.is_cuda
        else out.index_add_(0, index, wide_rows)
    )
    return total.to(rows.dtype)
