"""Work tables: every row and key has one program, masks are where they must be, work is even."""

import heapq
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist.attention.scca.pattern import model_rules
from lcdist.config.schema import SccaOptions
from lcdist_kernels.common import document_starts
from lcdist_kernels.full import piece_splits
from lcdist_kernels.full.piece_kernel import pieces_bwd, pieces_fwd
from lcdist_kernels.full.piece_tables import make_tables
from lcdist_kernels.full.pieces import WHOLE, Launches, WorkTables
from lcdist_kernels.full.tile_configs import BWD_DKV, BWD_DQ, FWD_HOPPER
from lcdist_kernels.scca import Rule, dense_mask, scca_reference
from lcdist_kernels.scca.pieces import work_of
from lcdist_kernels.tile_ranges import device_stream
from lcdist_kernels.triton_common import Launch
from tests.kernels.helpers import HERE, assert_close, on_device
from tests.kernels.test_full import borders, with_grads
from tests.kernels.test_scca import MIXED, REPEATED

ON_CPU = device_stream(torch.empty(0))
# Of all key heads one rule; no key at all; steps that meet in one key head.
EMPTY = (Rule("chunk", 16, 999), Rule("pair", 90, 89), Rule("key", 50, 49), Rule("fold", 16, 48))
ALIKE = (MIXED[5],) * 8


def tables_of(
    rules: tuple[Rule, ...], nheads_kv: int, starts: Tensor, block_m: int, block_n: int
) -> WorkTables:
    rows, keys = Launch(block_m, block_n, 4, 1), Launch(block_n, block_m, 4, 1)
    return make_tables(work_of(rules, nheads_kv, starts), Launches(rows, rows, keys), ON_CPU)


def tokens(first: int, step: int, count: int, begin: int, end: int) -> Tensor:
    """Return numbers begin..end of an evenly spaced sequence."""
    return torch.arange(count)[begin:end] * step + first


class Seen:
    """Scores that programs compute, `[heads, s, s]`: all, and those without a mask."""

    def __init__(self, nheads: int, seqlen: int) -> None:
        self.visited = torch.zeros(nheads, seqlen, seqlen, dtype=torch.int64)
        self.unmasked = torch.zeros(nheads, seqlen, seqlen, dtype=torch.bool)

    def add(self, heads: range, rows: Tensor, keys: Tensor, masked: bool) -> None:
        for head in heads:
            self.visited[head][rows[:, None], keys] += 1
            if not masked:
                self.unmasked[head][rows[:, None], keys] = True

    def check(self, mask: Tensor) -> None:
        assert torch.all(self.visited[mask] == 1), "each visible score is computed once"
        assert torch.all(self.visited <= 1)
        assert torch.all(mask[self.unmasked]), "hidden scores are under a mask"


@pytest.mark.parametrize("tiles", [(16, 16), (32, 16), (7, 13)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("rules", "nheads_kv"), [(MIXED, 4), (MIXED, 1), (REPEATED, 2), (EMPTY, 4), (ALIKE, 2)]
)
@pytest.mark.parametrize("fewest_keys", [1, piece_splits.FEWEST_KEYS])
def test_programs_compute_what_is_visible_once(
    rules: tuple[Rule, ...],
    nheads_kv: int,
    packed: bool,
    tiles: tuple[int, int],
    fewest_keys: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(piece_splits, "FEWEST_KEYS", fewest_keys)
    seqlen, index = 85, torch.arange(85)
    starts = document_starts(borders(seqlen) if packed else None, index, seqlen)
    tables = tables_of(rules, nheads_kv, starts, *tiles)
    mask = dense_mask(rules, index, starts, index, starts)
    block_m, block_n = tiles
    by_rows, owned = Seen(len(rules), seqlen), torch.zeros(len(rules), seqlen)
    for program in tables.fwd.tolist():
        head, kv, row, row_step, rows, _, _, start, key, key_step, keys, lo, a, b, hi = program
        assert kv == head * nheads_kv // len(rules)
        own = tokens(row, row_step, rows, start, start + block_m)
        owned[head, own] += 1
        for tile in range(lo, hi):
            there = tokens(key, key_step, keys, tile * block_n, (tile + 1) * block_n)
            assert len(there) == block_n or not a <= tile < b, "a tile of fewer keys is masked"
            by_rows.add(range(head, head + 1), own, there, not a <= tile < b)
    assert torch.all(owned == 1)
    by_rows.check(mask)
    by_keys, owned = Seen(len(rules), seqlen), torch.zeros(nheads_kv, seqlen)
    group, runs = len(rules) // nheads_kv, tables.runs.tolist()
    sums = {tuple(row[:5]): range(*row[5:]) for row in tables.sums.tolist()}
    assert bool(sums) == bool(tables.num_parts)
    # Where almost nothing is visible, parts save no time.
    assert bool(sums) == (fewest_keys == 1) or rules == EMPTY
    parts: dict[tuple[int, ...], list[int]] = {}
    for kv, query_head, key, key_step, keys, start, begin, end, part in tables.dkv.tolist():
        assert query_head == kv * group
        own = tokens(key, key_step, keys, start, start + block_m)
        if part == WHOLE:
            owned[kv, own] += 1
        else:
            parts.setdefault((kv, key, key_step, keys, start), []).append(part)
        for head, heads, row, row_step, rows, _, _, lo, a, b, hi in runs[begin:end]:
            for tile in range(lo, hi):
                there = tokens(row, row_step, rows, tile * block_n, (tile + 1) * block_n)
                assert len(there) == block_n or not tables.even_m
                first = kv * group + head
                by_keys.add(range(first, first + heads), there, own, not a <= tile < b)
    for tile, expected in sums.items():
        assert sorted(parts.pop(tile)) == list(expected)
        owned[tile[0], tokens(*tile[1:4], tile[4], tile[4] + block_m)] += 1
    assert not parts and torch.all(owned == 1)
    assert sum(map(len, sums.values())) == tables.num_parts
    by_keys.check(mask)


@pytest.mark.parametrize("packed", [False, True])
def test_limits_by_slot_are_those_of_the_rules(packed: bool) -> None:
    seqlen, index = 85, torch.arange(85)
    starts = document_starts(borders(seqlen) if packed else None, index, seqlen)
    tables = tables_of(MIXED, 4, starts, 16, 16)
    mask = dense_mask(MIXED, index, starts, index, starts)
    q_lo, q_hi = tables.q_lo.flatten(), tables.q_hi.flatten()
    for program in tables.fwd.tolist():
        head, _, row, row_step, rows, slot, limits, start, key, key_step, keys, *_ = program
        own, there = (
            tokens(*one, 0, seqlen) for one in ((row, row_step, rows), (key, key_step, keys))
        )
        at = torch.arange(limits, limits + rows)
        shown = (there >= q_lo[at, None]) & (there <= q_hi[at, None])
        assert torch.equal(shown, mask[head][own[:, None], there])
        assert 0 <= slot <= seqlen - rows and 0 <= start < rows


@pytest.mark.parametrize("fewest_keys", [1, piece_splits.FEWEST_KEYS])
def test_the_order_of_programs_does_not_change_a_bit(
    fewest_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piece_splits, "FEWEST_KEYS", fewest_keys)
    seqlen = 50
    rules = (Rule("fold", 16, 48), Rule("chunk", 17, 9), Rule("pair", 2, 1), Rule("pair", 2, 0))
    q, k, v = (x.detach()[:1] for x in on_device(seqlen, (4, 2), dtype=torch.float32))
    small = Launch(16, 16, 4, 1)
    work = work_of(rules, 2, torch.zeros(seqlen, dtype=torch.int64))
    tables = make_tables(work, Launches(small, small, small), device_stream(q))
    results = []
    for turn in range(2):
        orders = {
            name: getattr(tables, name)[torch.randperm(len(getattr(tables, name))).to(HERE)]
            for name in ("fwd", "dq", "dkv")
        }
        own = tables._replace(**orders) if turn else tables
        torch.manual_seed(1)
        out, lse2 = pieces_fwd(q, k, v, own, 0.25)
        dout = torch.randn_like(q)
        grads = pieces_bwd(dout, q, k, v, out, lse2, own, 0.25)
        results.append((out, lse2, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert bool(tables.num_parts) == (fewest_keys == 1)
    doubles = [x.double().cpu() for x in (q, k, v)]
    truth = with_grads(
        scca_reference(*(x.requires_grad_() for x in doubles), rules=rules, softmax_scale=0.25),
        doubles,
        dout.double().cpu(),
    )
    assert_close([results[0][0], *results[0][2:]], truth)


def makespan(costs: list[int], processors: int = 132) -> float:
    """Return the time until all programs have ended, over the time if work were spread evenly."""
    ends = [0] * processors
    for cost in costs:
        heapq.heapreplace(ends, ends[0] + cost)
    return max(ends) * processors / sum(costs)


def costs_of(tables: WorkTables) -> dict[str, list[int]]:
    """Return the steps of each program, and 3 for its start and end."""
    steps = tables.runs[:, 1] * (tables.runs[:, -1] - tables.runs[:, -4])
    before = torch.cat((steps.new_zeros(1), steps.cumsum(0).to(steps.dtype)))
    begin, end = tables.dkv[:, 6:8].long().T
    return {
        "dkv": (before[end] - before[begin] + 3).tolist(),
        **{
            name: (table[:, -1] - table[:, -4] + 3).tolist()
            for name, table in (("fwd", tables.fwd), ("dq", tables.dq))
        },
    }


PATTERNS: list[dict[str, Any]] = [
    {"pattern": "fixed"},
    {"pattern": "flow"},
    {"pattern": "sda", "dilation": 4},
    {"pattern": "longmixed"},
]
HOPPER = Launches(FWD_HOPPER[128, 2], BWD_DQ[128, 2], BWD_DKV[128, 2])


@pytest.mark.parametrize(("seqlen", "most"), [(8192, 1.15), (32768, 1.03)])
@pytest.mark.parametrize("words", PATTERNS)
def test_the_processors_of_an_h100_end_together(
    words: dict[str, Any], seqlen: int, most: float
) -> None:
    starts = torch.zeros(seqlen, dtype=torch.int64)
    work = work_of(model_rules(SccaOptions(**words), 32, 8), 8, starts)
    tables = make_tables(work, HOPPER, ON_CPU)
    for name, costs in costs_of(tables).items():
        assert makespan(costs) <= most, name
    # All of a program's tiles are whole in the middle of a piece; no row is past an end.
    assert tables.even_m


@pytest.mark.parametrize("words", PATTERNS)
@pytest.mark.parametrize(("tp_size", "seqlen"), [(2, 8192), (8, 8192), (8, 32768)])
def test_few_key_heads_keep_the_processors_busy(
    tp_size: int, seqlen: int, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = torch.zeros(seqlen, dtype=torch.int64)
    nheads = 32 // tp_size
    rules = model_rules(SccaOptions(**words), 32, 8)[-nheads:]
    work = work_of(rules, 8 // tp_size, starts)
    costs = costs_of(make_tables(work, HOPPER, ON_CPU))["dkv"]
    monkeypatch.setattr(piece_splits, "FEWEST_KEYS", seqlen + 1)
    before = costs_of(make_tables(work, HOPPER, ON_CPU))["dkv"]
    # Parts have starts and ends of their own, so the time is compared with the work without them.
    assert makespan(costs) * sum(costs) <= 1.25 * sum(before)
    assert len(costs) > len(before) or makespan(before) <= 1.25
