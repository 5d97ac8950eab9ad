"""`AttentionContext`: the arguments of one attention call, with cached tables of token numbers.

All masks and rotary angles come from the tables here. A table depends on the layout, the rank, the
document borders and the device, so all layers of a micro-batch share it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcdist.attention.shape import HeadSlice
from lcdist.exchange import Group, group_rank
from lcdist.layout import ContextLayout
from lcdist_kernels import Rotary
from lcdist_kernels.common import document_borders, document_starts

# Pipeline stages alternate between micro-batches, and rows of packed documents have a set each.
TABLE_SETS_KEPT = 16

CPU = torch.device("cpu")


class LayoutKey(NamedTuple):
    """The tokens of one rank as a small dictionary key."""

    kind: str
    seqlen: int
    cp_size: int
    rank: int


class DecodeCache(NamedTuple):
    """Keys and values of earlier tokens, and the positions of the new tokens.

    Attributes:
        k, v: `[b, s_cache, h_kv, d]`, un-rotated; entry j belongs to position j. They hold the new
            tokens' own keys and values already.
        positions: integers on the CPU, `[n]`, or `[b, n]` if rows differ in length.
    """

    k: Tensor
    v: Tensor
    positions: Tensor


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """Arguments of one attention call besides q, k and v.

    `AttentionMethod` builds it. In `reference` the layout has one rank and the length of q; in
    `decode` it has one rank and the length of the cache. There `group` is None.

    Attributes:
        options: the method's options.
        layout: the cut of the sequence over context-parallel ranks.
        group: the context-parallel group; None for one process.
        rotary: rotation of queries and keys; None for no rotation.
        cu_seqlens: document borders in the whole sequence, int32 `[n + 1]`; None for one document.
            Tokens after the last border form a document of their own.
        softmax_scale: factor of a score.
        params: learnable parameters of the method; None if it has none.
        heads: position of q's heads in the model.
        impl: name of the implementation.
        position_ids: explicit rotary positions, `[s]` or `[b, s]`, that `reference` may be given.
    """

    options: Any
    layout: ContextLayout
    group: Group
    rotary: Rotary | None
    cu_seqlens: Tensor | None
    softmax_scale: float
    params: Mapping[str, Tensor] | None
    heads: HeadSlice
    impl: str
    position_ids: Tensor | None = None

    @cached_property
    def rank(self) -> int:
        """This process's rank in the context-parallel group."""
        return group_rank(self.group)

    @cached_property
    def layout_key(self) -> LayoutKey:
        """This rank's tokens as a key for caches of plans and tables."""
        return self.key_of(self.rank)

    def key_of(self, rank: int) -> LayoutKey:
        """Return the key of another rank's tokens."""
        return LayoutKey(self.layout.kind, self.layout.seqlen, self.layout.cp_size, rank)

    @cached_property
    def documents(self) -> tuple[int, ...] | None:
        """Document borders as integers, a key for caches; None for one document.

        `cu_seqlens` is read once per micro-batch. Raises ValueError for borders that are not legal.
        """
        return document_borders(self.cu_seqlens, self.layout.seqlen)

    @property
    def kernel_arguments(self) -> dict[str, Any]:
        """Keyword arguments that are the same for every method's kernel function."""
        return self._shared_arguments | {"impl": self.impl}

    @property
    def reference_arguments(self) -> dict[str, Any]:
        """Keyword arguments that are the same for every method's dense reference."""
        return self._shared_arguments | {"positions": self.position_ids}

    @property
    def _shared_arguments(self) -> dict[str, Any]:
        scale = self.softmax_scale
        return {"rotary": self.rotary, "cu_seqlens": self.cu_seqlens, "softmax_scale": scale}

    def token_ids(self, rank: int | None = None, device: torch.device = CPU) -> Tensor:
        """Return the global positions of a rank's tokens, increasing: int64 `[local_seqlen]`.

        The table is cached and shared: never write to it. rank: default this rank.
        """
        return token_table("token_ids", self._key(rank), None, device)

    def starts(self, rank: int | None = None, device: torch.device = CPU) -> Tensor:
        """Return the first token of the document of each of a rank's tokens: as `token_ids`."""
        return token_table("starts", self._key(rank), self.documents, device)

    def positions(self, rank: int | None = None, device: torch.device = CPU) -> Tensor:
        """Return the positions of a rank's tokens inside their documents: as `token_ids`.

        Explicit `position_ids` take precedence.
        """
        if self.position_ids is not None:
            return self.position_ids.to(device)
        return token_table("positions", self._key(rank), self.documents, device)

    def rotate(self, x: Tensor, rank: int | None = None) -> Tensor:
        """Rotate queries or keys `[b, s_local, h, d]` of a rank by their positions."""
        return x if self.rotary is None else self.rotate_to(x, self.positions(rank, x.device))

    def rotate_to(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `x` `[b, s, h, d]` by explicit positions, integers `[s]` or `[b, s]`."""
        return x if self.rotary is None else self.rotary.rotate(x, positions)

    def _key(self, rank: int | None) -> LayoutKey:
        return self.layout_key if rank is None else self.key_of(rank)


def token_table(
    name: str, key: LayoutKey, documents: tuple[int, ...] | None, device: torch.device
) -> Tensor:
    """Return one cached table of token numbers: int64 `[local_seqlen]`.

    name: "token_ids", "starts" or "positions"; see the methods of `AttentionContext`.
    """
    if documents is None and name == "positions":
        name = "token_ids"
    return _table_set(key[:3], documents).find(name, key.rank, device)


def rank_positions(
    layout: ContextLayout, rank: int, borders: Sequence[Tensor] | None, device: torch.device
) -> Tensor:
    """Return the positions of a rank's tokens inside their documents, cached and shared.

    Args:
        layout: the cut of the sequences.
        rank: number among the context-parallel ranks.
        borders: `cu_seqlens` of each row of the batch; None: one document a row.
        device: where the result lies.

    Returns:
        int64 `[local_seqlen]`, or `[b, local_seqlen]` where rows have borders of their own.
    """
    key = LayoutKey(layout.kind, layout.seqlen, layout.cp_size, rank)
    if borders is None:
        return token_table("positions", key, None, device)
    documents = tuple(document_borders(row, layout.seqlen) for row in borders)
    return _row_positions(key, documents, device)


@lru_cache(maxsize=TABLE_SETS_KEPT)
def _row_positions(
    key: LayoutKey, documents: tuple[tuple[int, ...] | None, ...], device: torch.device
) -> Tensor:
    # As in `_TableSet.find`.
    with torch.inference_mode(False), torch.no_grad():
        return torch.stack([token_table("positions", key, row, device) for row in documents])


class _TableSet:
    """Tables of all ranks and devices for one layout and one set of documents, made on first use.

    Threads of virtual ranks share a set: two that miss at once both make the same table.
    """

    def __init__(self, layout: tuple[str, int, int], documents: tuple[int, ...] | None) -> None:
        self._layout, self._documents = layout, documents
        self._tables: dict[tuple[str, int, torch.device], Tensor] = {}

    def find(self, name: str, rank: int, device: torch.device) -> Tensor:
        """Return a table, from the cache if it is there."""
        table = self._tables.get((name, rank, device))
        if table is None:
            # A table made in inference mode could not be saved for a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                on_cpu = device.type == "cpu"
                table = self._make(name, rank) if on_cpu else self.find(name, rank, CPU).to(device)
            self._tables[name, rank, device] = table
        return table

    def _make(self, name: str, rank: int) -> Tensor:
        if name == "token_ids":
            return ContextLayout(*self._layout).positions(rank)
        token_ids = token_table("token_ids", LayoutKey(*self._layout, rank), None, CPU)
        if name == "positions":
            return token_ids - self.find("starts", rank, CPU)
        borders = None if self._documents is None else torch.tensor(self._documents)
        return document_starts(borders, token_ids, self._layout[1])


@lru_cache(maxsize=TABLE_SETS_KEPT)
def _table_set(layout: tuple[str, int, int], documents: tuple[int, ...] | None) -> _TableSet:
    return _TableSet(layout, documents)
