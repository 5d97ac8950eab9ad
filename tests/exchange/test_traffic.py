"""traffic: exact bytes by verb, forward and backward; a shift sends no whole shard."""

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
from tests.exchange.cases import full_sizes, halo, shard_sizes

TOKEN = 3 * 4
SHARD = 6 * TOKEN


def _halo(x, group):
    return torch.cat([x, shift(x, halo(group_size(group)), group).wait()], 1)


def _uneven(x, group):
    n, rank = group_size(group), group_rank(group)
    x = x.expand(1, 6, 3)[:, :1].expand(1, shard_sizes(n)[rank], 3).unsqueeze(-1)
    x = x.expand(1, shard_sizes(n)[rank], 3, sum(full_sizes(n)))
    return swap(x, 1, 3, group, shard_sizes=shard_sizes(n), full_sizes=full_sizes(n)).wait()


def _uneven_bytes(rank, n):
    return shard_sizes(n)[rank] * TOKEN * (sum(full_sizes(n)) - full_sizes(n)[rank])


def _uneven_backward_bytes(rank, n):
    return full_sizes(n)[rank] * TOKEN * (sum(shard_sizes(n)) - shard_sizes(n)[rank])


RUNS = {
    "ring": (
        lambda x, g: torch.cat([b for _, b in ring(x, g)], 1),
        lambda rank, n: (n - 1) * SHARD,
        lambda rank, n: (n - 1) * SHARD,
    ),
    # Two tokens to the next rank, whatever the shard; their gradients to the previous one.
    "shift": (
        _halo,
        lambda rank, n: 2 * TOKEN * (rank < n - 1),
        lambda rank, n: 2 * TOKEN * (rank > 0),
    ),
    "gather": (
        lambda x, g: gather(x, g).wait(),
        lambda rank, n: (n - 1) * SHARD,
        lambda rank, n: (n - 1) * SHARD,
    ),
    "swap": (_uneven, _uneven_bytes, _uneven_backward_bytes),
}


def count_bytes(group: Group) -> list[tuple[str, dict, dict, int, int]]:
    rank, n = group_rank(group), group_size(group)
    rows = []
    for verb, (run, forward, backward) in RUNS.items():
        x = torch.ones(1, 6, 3, requires_grad=True)
        with traffic() as sent_forward:
            out = run(x, group)
        with traffic() as sent_backward:
            # A CUDA backward has its own thread, which a process group's counter must include.
            if isinstance(group, dist.ProcessGroup):
                thread = threading.Thread(target=lambda out=out: out.sum().backward())
                thread.start()
                thread.join()
            else:
                out.sum().backward()
        rows.append(
            (
                verb,
                dict(sent_forward.sent),
                dict(sent_backward.sent),
                forward(rank, n),
                backward(rank, n),
            )
        )
    return rows


def check_bytes(rows):
    for verb, sent_forward, sent_backward, forward, backward in rows:
        assert sent_forward == ({verb: forward} if forward else {}), verb
        assert sent_backward == ({verb: backward} if backward else {}), verb


@pytest.mark.parametrize("n", [1, 2, 4])
def test_bytes_on_virtual_ranks_are_exact(n):
    for rows in VirtualGroup(n).run(count_bytes):
        check_bytes(rows)


def test_gather_counts_requested_blocks_and_requests():
    requests = {0: [3, 3, 2, 0], 1: []}

    def run(rank):
        x = torch.ones(1, 8, 3, requires_grad=True)
        with traffic() as sent_forward:
            out = gather(x, rank, blocks=requests[rank.rank()], block_size=4).wait()
        with traffic() as sent_backward:
            out.sum().backward()
        return sent_forward.total, sent_backward.total

    counts, request, block = 2 * 8, 2 * 8, 4 * TOKEN
    requester, owner = VirtualGroup(2).run(run)
    assert requester == (counts + request, 2 * block)
    assert owner == (counts + 2 * block, 0)


def test_ring_with_gradients_counts_blocks_and_gradients():
    def run(rank):
        lap = ring_with_gradients(torch.ones(6, 3, dtype=torch.bfloat16), rank)
        with traffic() as t:
            for visit in lap:
                visit.add_gradient(visit.block)
            lap.result()
        return t.total

    # Three hops of bfloat16 blocks, four of their float32 gradients.
    assert VirtualGroup(4).run(run) == [3 * SHARD // 2 + 4 * SHARD] * 4


def test_counter_opened_outside_counts_all_ranks_and_nests():
    group = VirtualGroup(3)
    with traffic() as outer:
        with traffic() as inner:
            group.run(lambda rank: gather(torch.ones(1, 6, 3), rank).wait())
        group.run(lambda rank: gather(torch.ones(1, 6, 3), rank).wait())
    assert inner.sent == {"gather": 3 * 2 * SHARD}
    assert outer.total == 2 * inner.total
    group.run(lambda rank: gather(torch.ones(1, 6, 3), rank).wait())
    assert outer.total == 2 * inner.total


def test_threads_started_by_hand_count_themselves():
    group, totals = VirtualGroup(2), {}

    def rank(r):
        with traffic() as t:
            gather(torch.ones(1, 6, 3), group[r]).wait()
            shift(torch.ones(1, 6, 3), [(0, 1, 0, 1)], group[r]).wait()
        totals[r] = t.total

    with traffic() as all_ranks:
        threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert totals == {0: SHARD + TOKEN, 1: SHARD}
    assert all_ranks.total == 2 * SHARD + TOKEN


def test_group_run_in_a_thread_counts_in_that_thread():
    totals = []

    def main():
        with traffic() as t:
            VirtualGroup(3).run(lambda rank: gather(torch.ones(1, 6, 3), rank).wait())
        totals.append(t.total)

    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
    assert totals == [3 * 2 * SHARD]
