"""Make the work tables of `pieces` on the host, in a few tensor operations however many pieces."""

from collections.abc import Sequence
from math import lcm
from typing import NamedTuple

import torch
from torch import Tensor

from lcdist_kernels.full.piece_splits import Split, split_programs
from lcdist_kernels.full.pieces import NO_KEYS, WHOLE, Launches, Run, Work, WorkTables
from lcdist_kernels.tile_ranges import DeviceStream, send, tiles_of_runs
from lcdist_kernels.triton_common import Launch

SIZE_CLASSES = 16
# In place of a rule: a query head that reads another key head.
NOT_READ = -1


def make_tables(
    work: Work, launches: Launches, place: DeviceStream, described: Launches | None = None
) -> WorkTables:
    """Return the tables of the work on the device; takes time in proportion to the length.

    described: tiles that take the place of `launches` where keys can have descriptors.
    """
    seeing = [piece for piece in work.pieces if len(piece.keys)]
    key_step = _common_step([piece.keys for piece in seeing], work.num_keys)
    if described and key_step:
        launches = described
    pieces = PieceColumns.of(work)
    split = key_programs(work, pieces, launches.dkv)
    block_m = launches.dkv.block_m
    tables = (
        pieces.q_lo.view_as(work.q_lo),
        pieces.q_hi.view_as(work.q_hi),
        row_programs(work, pieces, launches.fwd),
        row_programs(work, pieces, launches.dq),
        split.programs,
        split.runs,
        split.sums,
    )
    return WorkTables(
        *(send(table.to(torch.int32), place) for table in tables),
        num_parts=int(split.sums[-1, -1]) if len(split.sums) else 0,
        has_lo=bool(work.q_lo.max() > 0),
        even_m=all(len(piece.rows) % block_m == 0 for piece in seeing),
        key_step=key_step,
        row_step=_common_step([piece.rows for piece in seeing], work.q_lo.shape[1]),
        launches=launches,
    )


def _common_step(places: Sequence[range], count: int) -> int:
    """Return the step of all ranges of more than one token; 0 if they have none that fits."""
    steps = {each.step for each in places if len(each) > 1} or {1}
    step = steps.pop()
    return 0 if steps or count % step else step


class PieceColumns(NamedTuple):
    """Pieces as columns, int64 `[pieces]`, and the limits of all rows by slot, flat."""

    rule: Tensor
    row: Tensor
    row_step: Tensor
    rows: Tensor
    key: Tensor
    key_step: Tensor
    keys: Tensor
    slot: Tensor
    limits: Tensor
    q_lo: Tensor
    q_hi: Tensor

    @classmethod
    def of(cls, work: Work) -> "PieceColumns":
        seqlen = work.q_lo.shape[1]
        columns = [
            (rule, rows.start, rows.step, len(rows), keys.start, keys.step, len(keys))
            for rule, rows, keys in work.pieces
        ]
        rule, row, row_step, rows, key, key_step, keys = torch.tensor(columns).T
        limits = rows.cumsum(0) - rows
        owner, place = expand(rows)
        token = rule[owner] * seqlen + row[owner] + row_step[owner] * place
        assert len(token) == work.q_lo.numel(), "each row of a rule is in one piece"
        return cls(
            *(rule, row, row_step, rows, key, key_step, keys),
            limits - rule * seqlen,
            limits,
            work.q_lo.flatten()[token],
            work.q_hi.flatten()[token],
        )


def row_programs(work: Work, pieces: PieceColumns, launch: Launch) -> Tensor:
    """Return a `RowProgram` for each tile of rows and query head, most tiles of keys first."""
    block_m, block_n = launch.block_m, launch.block_n
    piece, tile = expand(-(-pieces.rows // block_m))
    start = tile * block_m
    begin = pieces.limits[piece] + start
    end = begin + (pieces.rows[piece] - start).clamp_max(block_m) - 1
    key, key_step, keys = (x[piece] for x in (pieces.key, pieces.key_step, pieces.keys))

    def keys_before(number: Tensor) -> Tensor:
        """Count the piece's keys below a token number."""
        return (-((key - number) // key_step)).clamp_min(0).minimum(keys)

    # Limits do not decrease in a piece: those of a tile are between those of its ends.
    ranges = tiles_of_runs(
        keys_before(pieces.q_lo[begin]),
        keys_before(pieces.q_hi[end] + 1),
        keys_before(pieces.q_lo[end]),
        keys_before(pieces.q_hi[begin] + 1) // block_n,
        block_n,
    )
    members = [[h for h, r in enumerate(work.heads) if r == rule] for rule in _rules(work)]
    counts = torch.tensor([len(heads) for heads in members])
    at, member = expand(counts[pieces.rule[piece]])
    first = (counts.cumsum(0) - counts)[pieces.rule[piece]]
    head = torch.tensor([h for heads in members for h in heads])[first[at] + member]
    key_head = torch.tensor(work.key_heads)[head]
    columns = (
        pieces.row, pieces.row_step, pieces.rows, pieces.slot, pieces.limits, pieces.key,
        pieces.key_step, pieces.keys,
    )  # fmt: skip
    row, row_step, rows, slot, limits, *of_keys = (x[piece[at]] for x in columns)
    table = torch.stack(
        (head, key_head, row, row_step, rows, slot, limits, start[at], *of_keys, *ranges[at].T), 1
    )
    steps = ranges[at, 3] - ranges[at, 0]
    if not work.all_rows:
        # dq makes the row statistics that dk and dv read, also of rows that see nothing.
        kept = pieces.keys[piece[at]] > 0
        table, key_head, steps = (x[kept] for x in (table, key_head, steps))
    return table[longest_first(steps, key_head)]


def _rules(work: Work) -> range:
    return range(len(work.q_lo))


def longest_first(steps: Tensor, head: Tensor) -> Tensor:
    """Return the order of programs: by falling number of steps, so that processors end together.

    Among programs that differ by less than a 16th of the longest, key heads take turns: what runs
    at one time then shares its keys, or its queries, in the L2 cache.
    """
    if not len(steps):
        return steps
    order = steps.argsort(stable=True, descending=True)
    order = order[head[order].argsort(stable=True)]
    classes = steps // max(int(steps.max()) // SIZE_CLASSES, 1)
    return order[classes[order].argsort(stable=True, descending=True)]


def expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for counts (2, 0, 3), the owners (0, 0, 2, 2, 2) and the places (0, 1, 0, 1, 2)."""
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return owner, torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]


class _KeyHeads(NamedTuple):
    """Key heads whose query heads follow the same rules.

    numbers: each key head and its first query head. rules: of its `group` query heads, NOT_READ for
    those that read another key head. step: of its tiles of keys.
    """

    numbers: list[tuple[int, int]]
    rules: tuple[int, ...]
    step: int

    def segments(self, rule: int) -> list[tuple[int, int]]:
        """Return (first, count) of each run of consecutive query heads that follow a rule."""
        found: list[tuple[int, int]] = []
        for i, other in enumerate(self.rules):
            if other != rule:
                continue
            if found and sum(found[-1]) == i:
                found[-1] = (found[-1][0], found[-1][1] + 1)
            else:
                found.append((i, 1))
        return found


def _key_heads(work: Work) -> list[_KeyHeads]:
    first: dict[int, int] = {}
    for head, key_head in enumerate(work.key_heads):
        if key_head != NO_KEYS:
            first.setdefault(key_head, head // work.group * work.group)
    alike: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for number in range(work.nheads_k):
        begin = first.get(number, 0)
        rules = tuple(
            work.heads[head] if work.key_heads[head] == number else NOT_READ
            for head in range(begin, begin + work.group)
        )
        alike.setdefault(rules, []).append((number, begin))
    steps: dict[int, int] = {}
    for piece in work.pieces:
        if len(piece.keys):
            steps[piece.rule] = lcm(steps.get(piece.rule, 1), piece.keys.step)
    return [
        _KeyHeads(numbers, rules, lcm(*(steps.get(rule, 1) for rule in rules)))
        for rules, numbers in alike.items()
    ]


def key_programs(work: Work, pieces: PieceColumns, launch: Launch) -> Split:
    """Return a `KeyProgram` for each tile of keys and key head, or several, longest first."""
    num_keys, block_n = work.num_keys, launch.block_n
    search = _RowSearch(pieces, num_keys)
    programs, costs, runs, made = [], [], [], 0
    for alike in _key_heads(work):
        # The tokens of a residue modulo `step` are cut into tiles.
        residue = torch.arange(min(alike.step, num_keys))
        keys = -(-(num_keys - residue) // alike.step)
        tiles = -(-keys // block_n)
        own, at = _runs_of(alike, pieces, search, tiles, launch)
        count = int(tiles.sum())
        ends = torch.searchsorted(at, torch.arange(count + 1))
        steps = own[:, 1] * (own[:, -1] - own[:, -4])
        cost = torch.zeros(count, dtype=torch.int64).index_add_(0, at, steps)
        of, tile = expand(tiles)
        step = torch.full_like(of, alike.step)
        columns = (residue[of], step, keys[of], tile * block_n, *(made + ends.unfold(0, 2, 1).T))
        table = torch.stack(columns, 1)
        for heads in alike.numbers:
            whole = torch.full((count, 1), WHOLE)
            programs.append(torch.cat((torch.tensor([heads]).expand(count, 2), table, whole), 1))
            costs.append(cost)
        runs.append(own)
        made += len(own)
    split = split_programs(torch.cat(programs), torch.cat(runs), torch.cat(costs), num_keys)
    order = longest_first(split.costs, split.programs[:, 0])
    return split._replace(programs=split.programs[order], costs=split.costs[order])


def _runs_of(
    alike: _KeyHeads, pieces: PieceColumns, search: "_RowSearch", tiles: Tensor, launch: Launch
) -> tuple[Tensor, Tensor]:
    """Return the `Run`s of key heads and the number of each one's tile, in increasing order.

    tiles: the number of tiles of each residue.
    """
    block_n, step = launch.block_n, alike.step
    mine = torch.isin(pieces.rule, torch.tensor(alike.rules)) & (pieces.keys > 0)
    piece = mine.nonzero().flatten()
    if not len(piece):
        none = torch.empty(0, dtype=torch.int64)
        return none.new_empty(0, len(Run._fields)), none
    # Residues modulo `step` among those of a piece, then the tiles that reach into it.
    at, turn = expand(step // pieces.key_step[piece])
    piece = piece[at]
    residue = pieces.key[piece] % pieces.key_step[piece] + turn * pieces.key_step[piece]
    piece, residue = piece[residue < len(tiles)], residue[residue < len(tiles)]
    last = pieces.key[piece] + (pieces.keys[piece] - 1) * pieces.key_step[piece]
    first = (-((residue - pieces.key[piece]) // step)).clamp_min(0) // block_n
    stop = torch.where(last >= residue, (last - residue) // step // block_n + 1, first)
    at, turn = expand((stop - first).clamp_min(0))
    piece, residue, tile = piece[at], residue[at], first[at] + turn
    ranges = search.rows_that_see(piece, residue, tile, step, launch)
    # A piece may see nothing of a tile that its keys reach into.
    seen = ranges[:, 3] > ranges[:, 0]
    piece, ranges = piece[seen], ranges[seen]
    number = ((tiles.cumsum(0) - tiles)[residue] + tile)[seen]

    segments = {rule: alike.segments(rule) for rule in set(alike.rules) - {NOT_READ}}
    flat = torch.tensor([(rule, *s) for rule in segments for s in segments[rule]])
    counts = torch.zeros(int(pieces.rule.max()) + 1, dtype=torch.int64)
    counts.index_add_(0, flat[:, 0], torch.ones_like(flat[:, 0]))
    flat = flat[flat[:, 0].argsort(stable=True), 1:]
    at, turn = expand(counts[pieces.rule[piece]])
    heads = flat[(counts.cumsum(0) - counts)[pieces.rule[piece[at]]] + turn]
    columns = (pieces.row, pieces.row_step, pieces.rows, pieces.slot, pieces.limits)
    runs = torch.cat((heads, torch.stack([x[piece[at]] for x in columns], 1), ranges[at]), 1)
    order = number[at].argsort(stable=True)
    return runs[order], number[at][order]


class _RowSearch:
    """Binary search in the limits of all pieces at once: those of piece p begin at p * stride."""

    def __init__(self, pieces: PieceColumns, num_keys: int) -> None:
        owner, _ = expand(pieces.rows)
        self._pieces, self._num_keys, self._stride = pieces, num_keys, num_keys + 2
        # Limits outside the keys are as good as those at their ends.
        self._q_lo, self._q_hi = (
            owner * self._stride + 1 + limit.clamp(-1, num_keys)
            for limit in (pieces.q_lo, pieces.q_hi)
        )

    def _rows(self, limits: Tensor, piece: Tensor, key: Tensor, right: bool = False) -> Tensor:
        """Count the rows of pieces with a limit below a key; or not above it, with `right`."""
        found = torch.searchsorted(limits, piece * self._stride + 1 + key, right=right)
        return found - self._pieces.limits[piece]

    def rows_that_see(
        self, piece: Tensor, residue: Tensor, tile: Tensor, step: int, launch: Launch
    ) -> Tensor:
        """Return the tiles of rows that see tiles of keys, as `query_ranges`: `[n, 4]`."""
        block_m, rows = launch.block_m, self._pieces.rows[piece]
        least = residue + step * launch.block_n * tile
        keys_left = (self._num_keys - 1 - least) // step
        greatest = least + step * keys_left.clamp_max(launch.block_n - 1)
        whole = self._rows(self._q_lo, piece, least, right=True)
        return tiles_of_runs(
            self._rows(self._q_hi, piece, least),
            self._rows(self._q_lo, piece, greatest, right=True),
            self._rows(self._q_hi, piece, greatest),
            # Tiles of fewer than block_m rows at the end of a piece need no mask.
            torch.where(whole == rows, -(-whole // block_m), whole // block_m),
            block_m,
        )
