"""The tables of a band: what is seen lies in visited tiles, unmasked tiles are seen wholly."""

import pytest
import torch
from torch import Tensor

from lcdist_kernels.full import visible
from lcdist_kernels.tile_ranges import (
    MAX_TOKEN,
    Indices,
    band_of,
    bounded_below,
    device_stream,
    key_ranges,
    on_device,
    query_ranges,
)
from tests.kernels.test_full import borders, tiled_starts

HERE = device_stream(torch.empty(0))
SEQLEN = 150
TILES = [(16, 16), (32, 16), (16, 64), (7, 13), (256, 8)]


def parts(cut: str) -> list[Tensor]:
    order = torch.arange(SEQLEN)
    if cut == "whole":
        return [order]
    if cut == "zigzag":
        pieces = order.chunk(6)
        return [torch.cat((pieces[i], pieces[5 - i])) for i in range(3)]
    if cut == "shuffled":
        return list(torch.randperm(SEQLEN).chunk(2))
    return [order[i::3] for i in range(3)]


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cut", ["whole", "zigzag", "striped", "shuffled"])
def test_visited_and_unmasked_tiles(cut: str, packed: bool, tiles: tuple[int, int]) -> None:
    starts = tiled_starts(borders(SEQLEN) if packed else None, SEQLEN)
    block_m, block_n = tiles
    for q_idx in parts(cut):
        for k_idx in parts(cut):
            band = band_of(q_idx, starts[q_idx], k_idx)
            seen = visible(q_idx, starts[q_idx], k_idx)
            m_of = torch.arange(len(q_idx)) // block_m
            n_of = torch.arange(len(k_idx)) // block_n
            by_query = key_ranges(band, *tiles, HERE)
            by_key = query_ranges(band, *tiles, HERE)
            assert by_query.dtype == by_key.dtype == torch.int32
            for ranges, of, other, block, shown in (
                (by_query, m_of, n_of, block_n, seen),
                (by_key, n_of, m_of, block_m, seen.T),
            ):
                first, full_lo, full_hi, stop = ranges[of].T[..., None]
                visited = (other >= first) & (other < stop)
                unmasked = (other >= full_lo) & (other < full_hi)
                assert torch.all(visited[shown]) and torch.all(shown[unmasked])
                assert torch.all(visited[unmasked])
                # A tile over the fold of a zigzag cut may reach for keys that lie in the gap.
                if cut != "shuffled" and (cut == "whole" or not packed):
                    check_no_waste((shown, visited, unmasked), of, other, block)
            bare = by_query[by_query[:, 1] < by_query[:, 2]]
            assert torch.all(bare[:, 2] <= len(k_idx) // block_n), "a tile of fewer keys is masked"


def check_no_waste(
    pairs: tuple[Tensor, Tensor, Tensor], of: Tensor, other: Tensor, block: int
) -> None:
    shown = pairs[0]
    tiles = [other == j for j in other.unique()]
    for i in of.unique():
        whole = torch.stack([shown[of == i][:, t].all() for t in tiles])
        seen, at, bare = (torch.stack([x[of == i][:, t].any() for t in tiles]) for x in pairs)
        assert torch.equal(seen, at)
        full = torch.tensor([int(t.sum()) == block for t in tiles])
        assert torch.all(bare[whole & full])


def test_documents_bound_a_band_from_below() -> None:
    index = torch.arange(20)
    assert not bounded_below(band_of(index, torch.zeros_like(index), index))
    assert bounded_below(band_of(index, 10 * (index >= 10), index))
    assert not bounded_below(band_of(index, 10 * (index >= 10), index[10:]))


def test_tables_are_found_again_by_value_and_numbers_changed_in_place_are_not_confused() -> None:
    index = torch.arange(20)
    table = on_device(Indices(index), HERE)
    assert on_device(Indices(torch.arange(20)), HERE) is table
    index[5] = 3
    assert torch.equal(on_device(Indices(index), HERE), index.to(torch.int32))
    assert not torch.equal(index, table)


def test_numbers_beyond_int32_are_refused() -> None:
    with pytest.raises(ValueError, match=str(MAX_TOKEN + 1)):
        Indices(torch.tensor([0, MAX_TOKEN + 1]))
