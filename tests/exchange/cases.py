"""Exchanges as plain functions, for every group size and every kind of group.

A case has a shape for each rank, the exchange, and its expected result computed from all shards.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lcdist.exchange import Group, gather, group_rank, group_size, ring, shift, swap

Run = Callable[[Tensor, Group], Tensor]
Expected = Callable[[list[Tensor], int], Tensor]
Shape = Callable[[int, int], tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """One exchange to test.

    run: exchanges this rank's x. expected: computes one rank's result from all shards.
    """

    run: Run
    expected: Expected
    shape: Shape = lambda rank, n: (2, 6, 3)


def _owners(rank: int, n: int) -> list[int]:
    return [(rank - i) % n for i in range(n)]


def _ring(x: Tensor, group: Group) -> Tensor:
    return torch.cat([block for _, block in ring(x, group)], 1)


def _ring_past(x: Tensor, group: Group) -> Tensor:
    """Use the blocks of earlier ranks only, as a causal method does."""
    rank = group_rank(group)
    return torch.cat([block for owner, block in ring(x, group) if owner <= rank], 1)


def _ring_own(x: Tensor, group: Group) -> Tensor:
    return [block for _, block in ring(x, group)][0]


def halo(n: int) -> list[tuple[int, int, int, int]]:
    """Send each rank's last two tokens to the next rank; rank 0 gets none, the last sends none."""
    return [(r, r + 1, 4, 6) for r in range(n - 1)]


def random_plan(n: int) -> list[tuple[int, int, int, int]]:
    """Return a plan with overlaps, repeats, empty intervals and tokens that stay, seeded by n."""
    g = torch.Generator().manual_seed(n)
    plan = []
    for _ in range(3 * n):
        src, dst, a, b = (int(torch.randint(k, (), generator=g)) for k in (n, n, 7, 7))
        plan.append((src, dst, min(a, b), max(a, b)))
    return plan


def _shift(plan_for: Callable[[int], list], dim: int) -> Case:
    def run(x: Tensor, group: Group) -> Tensor:
        pending = shift(x, plan_for(group_size(group)), group, dim=dim)
        # As in a method: the result enters the loss, even if it is empty.
        return torch.cat([x, pending.wait()], dim)

    def expected(shards: list[Tensor], rank: int) -> Tensor:
        plan = plan_for(len(shards))
        received = [shards[s].narrow(dim, a, b - a) for s, d, a, b in plan if d == rank]
        return torch.cat([shards[rank], *received], dim)

    return Case(run, expected, lambda rank, n: (6, 6, 6))


def _gather(dim: int) -> Case:
    return Case(
        lambda x, group: gather(x, group, dim=dim).wait(),
        lambda shards, rank: torch.cat(shards, dim),
    )


def requested_blocks(rank: int, n: int) -> list[int]:
    """Return block numbers in random order with repeats; none for rank 0 of several."""
    if rank == 0 and n > 1:
        return []
    g = torch.Generator().manual_seed(100 * n + rank)
    return torch.randint(3 * n, (2 + rank,), generator=g).tolist() * 2


def _blocks(dim: int, as_tensor: bool) -> Case:
    def run(x: Tensor, group: Group) -> Tensor:
        blocks = requested_blocks(group_rank(group), group_size(group))
        idx = torch.tensor(blocks, dtype=torch.int64) if as_tensor else blocks
        return torch.cat([x, gather(x, group, dim=dim, blocks=idx, block_size=2).wait()], dim)

    def expected(shards: list[Tensor], rank: int) -> Tensor:
        blocks = torch.cat(shards, dim).split(2, dim)
        chosen = requested_blocks(rank, len(shards))
        return torch.cat([shards[rank], *(blocks[b] for b in chosen)], dim)

    return Case(run, expected, lambda rank, n: (6, 6, 6))


def _swap_even(shard_dim: int, full_dim: int) -> Case:
    def expected(shards: list[Tensor], rank: int) -> Tensor:
        return torch.cat(shards, shard_dim).chunk(len(shards), full_dim)[rank]

    def shape(rank: int, n: int) -> tuple[int, ...]:
        sizes = [2, 3, 5]
        sizes[full_dim] = 2 * n
        return tuple(sizes)

    return Case(lambda x, g: swap(x, shard_dim, full_dim, g).wait(), expected, shape)


def shard_sizes(n: int) -> list[int]:
    """Return uneven sizes; some ranks hold nothing."""
    return [(3 * r + 1) % 4 for r in range(n)]


def full_sizes(n: int) -> list[int]:
    """Return uneven sizes; some ranks get nothing."""
    return [(2 * r + 2) % 5 for r in range(n)]


def _uneven(x: Tensor, group: Group) -> Tensor:
    n = group_size(group)
    return swap(x, 1, 2, group, shard_sizes=shard_sizes(n), full_sizes=full_sizes(n)).wait()


def _uneven_expected(shards: list[Tensor], rank: int) -> Tensor:
    return torch.cat(shards, 1).split(full_sizes(len(shards)), 2)[rank]


CASES = {
    "ring": Case(_ring, lambda s, rank: torch.cat([s[o] for o in _owners(rank, len(s))], 1)),
    "ring, past blocks": Case(
        _ring_past,
        lambda s, rank: torch.cat([s[o] for o in _owners(rank, len(s)) if o <= rank], 1),
    ),
    "ring, own block": Case(_ring_own, lambda s, rank: s[rank]),
    "ring, transposed": Case(
        lambda x, g: _ring(x.transpose(0, 1), g),
        lambda s, rank: torch.cat([s[o].transpose(0, 1) for o in _owners(rank, len(s))], 1),
    ),
    "shift, halo": _shift(halo, 1),
    "shift, random_plan": _shift(random_plan, 1),
    "shift, random_plan, dim 0": _shift(random_plan, 0),
    "shift, random_plan, dim -1": _shift(random_plan, -1),
    "shift, nothing": _shift(lambda n: [], 1),
    "gather, dim 0": _gather(0),
    "gather, dim 1": _gather(1),
    "gather, dim -1": _gather(-1),
    "blocks": _blocks(1, False),
    "blocks, tensor, dim 0": _blocks(0, True),
    "blocks, dim -1": _blocks(-1, False),
    "swap": _swap_even(1, 2),
    "swap, inverse": _swap_even(2, 0),
    "swap, uneven": Case(
        _uneven, _uneven_expected, lambda r, n: (2, shard_sizes(n)[r], sum(full_sizes(n)), 3)
    ),
}


def random_eighths(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return small random integers divided by 8: exact in every dtype, also bfloat16."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-64, 64, shape, generator=g)
    return (x / 8).to(dtype) if dtype.is_floating_point else x.to(dtype)


def wrong_results(group: Group, dtype: torch.dtype = torch.float64) -> list[str]:
    """Run every case; return the names of those with a wrong result."""
    rank, n = group_rank(group), group_size(group)
    wrong = []
    for number, (name, case) in enumerate(CASES.items()):
        shards = [random_eighths(case.shape(r, n), 1000 * number + r, dtype) for r in range(n)]
        with torch.no_grad():
            result = case.run(shards[rank], group)
        if result.dtype != dtype or not torch.equal(result, case.expected(shards, rank)):
            wrong.append(name)
    return wrong


def adjoint_products(group: Group) -> dict[str, tuple[float, float]]:
    """Run every case forward and backward; return this rank's parts of <E x, y> and <x, E' y>."""
    rank, n = group_rank(group), group_size(group)
    g = torch.Generator().manual_seed(rank)
    parts = {}
    for name, case in CASES.items():
        x = torch.randn(case.shape(rank, n), dtype=torch.float64, generator=g, requires_grad=True)
        out = case.run(x, group)
        y = torch.randn(out.shape, dtype=torch.float64, generator=g)
        out.backward(y)
        assert x.grad is not None and x.grad.shape == x.shape and x.grad.dtype == x.dtype
        with torch.no_grad():
            parts[name] = ((out * y).sum().item(), (x * x.grad).sum().item())
    return parts


def wrong_adjoints(parts: list[dict[str, tuple[float, float]]]) -> list[str]:
    """Return the cases for which <E x, y> and <x, E' y>, summed over ranks, differ."""
    wrong = []
    for name in CASES:
        left = sum(part[name][0] for part in parts)
        right = sum(part[name][1] for part in parts)
        # Written so that NaN fails.
        if not abs(left - right) <= 1e-10 * max(1.0, abs(left)):
            wrong.append(f"{name}: {left} != {right}")
    return wrong
