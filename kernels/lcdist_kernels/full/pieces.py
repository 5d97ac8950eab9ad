"""Work tables: softmax attention of many pieces in one launch, one row of a table a program.

A piece is some query rows of one rule over some keys, both evenly spaced in a sequence: a window,
or one residue of a dilated pattern. A query at row i sees the keys of its piece with q_lo[i] <= key
<= q_hi[i]. Every query head follows one rule, and every row of a rule is in exactly one piece, also
one without keys, so that each result is written once and nothing is zeroed before.

    forward, dq    a program is a tile of a piece's rows, for one query head
    dk, dv         a program is a tile of keys of one key head; it walks `runs`, the rows of one
                   piece that see the tile, in all query heads of the key head that follow the rule

A tile of keys is every `step`-th token, where step is the least common multiple of the steps of the
key head's pieces: so each key of a head has one program, whatever rules meet in the head. Programs
are sorted by the tiles they visit, longest first, so that processors end together. `piece_tables`
makes the tables.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lcdist_kernels.triton_common import Launch

# In place of the number of a part.
WHOLE = -1
# In place of a key head: a query head that sees no key of the tensor.
NO_KEYS = -1


class Piece(NamedTuple):
    """Rows of one rule and the keys they may see, as token numbers.

    In the order of the rows, neither limit decreases.
    """

    rule: int
    rows: range
    keys: range


class Work(NamedTuple):
    """Describe the attention of queries over a tensor of keys.

    Attributes:
        heads: the rule of each query head.
        key_heads: the head in the tensor of keys of each query head, NO_KEYS if it sees none; those
            of one head are in one run of `group` query heads that begins at a multiple of it.
        group: query heads of a key head.
        nheads_k: heads of the tensor of keys.
        num_keys: its tokens.
        pieces: by rule; the rows of a rule's pieces are all queries, each once.
        q_lo, q_hi: the first and the last key that a query sees, int64 `[rules, s]`; none where
            q_lo > q_hi.
        all_rows: whether rows that see no key get a result too: 0, and -inf as their lse.
    """

    heads: Sequence[int]
    key_heads: Sequence[int]
    group: int
    nheads_k: int
    num_keys: int
    pieces: Sequence[Piece]
    q_lo: Tensor
    q_hi: Tensor
    all_rows: bool = True


class Launches(NamedTuple):
    """Tiles of the three kernels."""

    fwd: Launch
    dq: Launch
    dkv: Launch


class WorkTables(NamedTuple):
    """Tables on the device for one kind of work, and the constants of its launches.

    A slot is the place of a row in its rule: rows of a piece have consecutive slots.

    Attributes:
        q_lo, q_hi: limits by slot, int32 `[rules, s]`.
        fwd, dq: int32 `[programs, len(RowProgram._fields)]`.
        dkv: int32 `[programs, len(KeyProgram._fields)]`. runs: int32 `[runs, len(Run._fields)]`.
        sums: int32 `[tiles, len(TileSum._fields)]`, of tiles of keys that have parts. num_parts: of
            all tiles.
        has_lo: whether q_lo may hide a key.
        even_m: whether no tile of rows in dkv goes past the end of a piece.
        key_step, row_step: the step of all pieces' keys and rows, as a descriptor needs; 0 if they
            differ or do not divide the sequence.
    """

    q_lo: Tensor
    q_hi: Tensor
    fwd: Tensor
    dq: Tensor
    dkv: Tensor
    runs: Tensor
    sums: Tensor
    num_parts: int
    has_lo: bool
    even_m: bool
    key_step: int
    row_step: int
    launches: Launches


class RowProgram(NamedTuple):
    """Columns of `fwd` and `dq`: a tile of rows of a piece in one query head.

    `key_head` is the head in the tensor of keys, `start` the tile's first row in the piece, `slot`
    that of the piece, `limits` the piece's place in q_lo and q_hi; the others are as in `Piece` and
    `tile_ranges`, tiles counted in the piece's keys.
    """

    head: Tensor
    key_head: Tensor
    row: Tensor
    row_step: Tensor
    rows: Tensor
    slot: Tensor
    limits: Tensor
    start: Tensor
    key: Tensor
    key_step: Tensor
    keys: Tensor
    first: Tensor
    whole_first: Tensor
    whole_stop: Tensor
    stop: Tensor


class KeyProgram(NamedTuple):
    """Columns of `dkv`: a tile of a key head's keys, and its runs.

    The tile begins at number `start` of `keys` keys: `key`, `key` + `key_step` and so on.
    `query_head` is the first query head of the key head. `part` is the place of the result in the
    workspace of parts, or WHOLE if this program writes dk and dv itself.
    """

    head: Tensor
    query_head: Tensor
    key: Tensor
    key_step: Tensor
    keys: Tensor
    start: Tensor
    runs_begin: Tensor
    runs_end: Tensor
    part: Tensor


class TileSum(NamedTuple):
    """Columns of `sums`: a tile of keys as in `KeyProgram`, and the parts that make it up."""

    head: Tensor
    key: Tensor
    key_step: Tensor
    keys: Tensor
    start: Tensor
    parts_begin: Tensor
    parts_end: Tensor


class Run(NamedTuple):
    """Columns of `runs`: rows of a piece that see a tile of keys, in consecutive query heads.

    `head` counts from the first query head of the key head.
    """

    head: Tensor
    heads: Tensor
    row: Tensor
    row_step: Tensor
    rows: Tensor
    slot: Tensor
    limits: Tensor
    first: Tensor
    whole_first: Tensor
    whole_stop: Tensor
    stop: Tensor
