"""traffic: bytes to the byte, by verb, forward and backward; a shift moves no shard."""

import threading

import pytest
import torch
import torch.distributed as dist

from lcdist.exchange import (
    Group,
    VirtualGroup,
    gather,
    group_rank,
    group_size,
    ring,
    ring_with_gradients,
    shift,
    swap,
    traffic,
)
from tests.distributed import run_ranks
from tests.exchange.cases import full_sizes, halo, shard_sizes

TOKEN = 3 * 4
SHARD = 6 * TOKEN


def _halo(x, group):
    return torch.cat([x, shift(x, halo(group_size(group)), group).wait()], 1)


def _uneven(x, group):
    n, me = group_size(group), group_rank(group)
    x = x.expand(1, 6, 3)[:, :1].expand(1, shard_sizes(n)[me], 3).unsqueeze(-1)
    x = x.expand(1, shard_sizes(n)[me], 3, sum(full_sizes(n)))
    return swap(x, 1, 3, group, shard_sizes=shard_sizes(n), full_sizes=full_sizes(n)).wait()


def _uneven_bytes(me, n):
    return shard_sizes(n)[me] * TOKEN * (sum(full_sizes(n)) - full_sizes(n)[me])


def _uneven_back(me, n):
    return full_sizes(n)[me] * TOKEN * (sum(shard_sizes(n)) - shard_sizes(n)[me])


RUNS = {
    "ring": (
        lambda x, g: torch.cat([b for _, b in ring(x, g)], 1),
        lambda me, n: (n - 1) * SHARD,
        lambda me, n: (n - 1) * SHARD,
    ),
    # Two tokens to the next rank, whatever the shard: back, their gradients to the last one.
    "shift": (_halo, lambda me, n: 2 * TOKEN * (me < n - 1), lambda me, n: 2 * TOKEN * (me > 0)),
    "gather": (
        lambda x, g: gather(x, g).wait(),
        lambda me, n: (n - 1) * SHARD,
        lambda me, n: (n - 1) * SHARD,
    ),
    "swap": (_uneven, _uneven_bytes, _uneven_back),
}


def _count(group: Group) -> list[tuple[str, dict, dict, int, int]]:
    me, n = group_rank(group), group_size(group)
    rows = []
    for verb, (run, forward, backward) in RUNS.items():
        x = torch.ones(1, 6, 3, requires_grad=True)
        with traffic() as there:
            out = run(x, group)
        with traffic() as back:
            # A CUDA backward has a thread of its own, which a process group's counter must see.
            if isinstance(group, dist.ProcessGroup):
                thread = threading.Thread(target=lambda out=out: out.sum().backward())
                thread.start()
                thread.join()
            else:
                out.sum().backward()
        rows.append((verb, dict(there.sent), dict(back.sent), forward(me, n), backward(me, n)))
    return rows


def _check(rows):
    for verb, there, back, forward, backward in rows:
        assert there == ({verb: forward} if forward else {}), verb
        assert back == ({verb: backward} if backward else {}), verb


@pytest.mark.parametrize("n", [1, 2, 4])
def test_bytes_on_virtual_ranks(n):
    for rows in VirtualGroup(n).run(_count):
        _check(rows)


def _world(rank: int, n: int):
    return _count(dist.group.WORLD)


@pytest.mark.parametrize("n", [1, 3])
def test_bytes_on_gloo(n):
    for rows in run_ranks(_world, n):
        _check(rows)


def test_blocks_count_what_is_asked_and_the_requests():
    wants = {0: [3, 3, 2, 0], 1: []}

    def run(rank):
        x = torch.ones(1, 8, 3, requires_grad=True)
        with traffic() as there:
            out = gather(x, rank, blocks=wants[rank.rank()], block_size=4).wait()
        with traffic() as back:
            out.sum().backward()
        return there.total, back.total

    counts, request, block = 2 * 8, 2 * 8, 4 * TOKEN
    asking, asked = VirtualGroup(2).run(run)
    assert asking == (counts + request, 2 * block)
    assert asked == (counts + 2 * block, 0)


def test_ring_home_counts_blocks_and_gradients():
    def run(rank):
        lap = ring_with_gradients(torch.ones(6, 3, dtype=torch.bfloat16), rank)
        with traffic() as t:
            for visit in lap:
                visit.add(visit.block)
            lap.home()
        return t.total

    # Three hops of bfloat16 blocks, four of their float32 gradients.
    assert VirtualGroup(4).run(run) == [3 * SHARD // 2 + 4 * SHARD] * 4


def test_opened_outside_it_counts_all_ranks_and_counters_nest():
    group = VirtualGroup(3)
    with traffic() as outer:
        with traffic() as inner:
            group.run(lambda rank: gather(torch.ones(1, 6, 3), rank).wait())
        group.run(lambda rank: gather(torch.ones(1, 6, 3), rank).wait())
    assert inner.sent == {"gather": 3 * 2 * SHARD}
    assert outer.total == 2 * inner.total
    group.run(lambda rank: gather(torch.ones(1, 6, 3), rank).wait())
    assert outer.total == 2 * inner.total


def test_threads_made_by_hand_count_themselves():
    group, totals = VirtualGroup(2), {}

    def rank(r):
        with traffic() as t:
            gather(torch.ones(1, 6, 3), group[r]).wait()
            shift(torch.ones(1, 6, 3), [(0, 1, 0, 1)], group[r]).wait()
        totals[r] = t.total

    with traffic() as everyone:
        threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert totals == {0: SHARD + TOKEN, 1: SHARD}
    assert everyone.total == 2 * SHARD + TOKEN


def test_a_group_run_in_a_thread_is_counted_in_that_thread():
    totals = []

    def main():
        with traffic() as t:
            VirtualGroup(3).run(lambda rank: gather(torch.ones(1, 6, 3), rank).wait())
        totals.append(t.total)

    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
    assert totals == [3 * 2 * SHARD]
