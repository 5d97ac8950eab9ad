"""Draw the tiles that the kernels of full attention visit, from the tables that the kernels read.

    python docs/tutorials/tiles.py [FOLDER]

Writes the pictures of `read_a_kernel.md` as SVG files; FOLDER is by default `tiles` beside this
file. The same code gives the same bytes.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lcdist.layout import ContextLayout
from lcdist_kernels.common import document_starts
from lcdist_kernels.full.tile_configs import BWD_DKV, FWD
from lcdist_kernels.tile_ranges import Band, band_of, device_stream, key_ranges, query_ranges

# The tables' entry for head_dim 128 in bf16: (block_m, block_n).
FWD_TILE = FWD[128, 2][:2]
DKV_TILE = BWD_DKV[128, 2][:2]
SEQLEN = 1024
BORDERS = (0, 300, 620, 1024)
RANKS = 4

HIDDEN, MASKED, WHOLE = "#eceff1", "#f6a04d", "#3f72b5"
TEXT = "#37474f"
LEGEND = ((WHOLE, "all visible: no mask"), (MASKED, "partly visible: mask"), (HIDDEN, "skipped"))


@dataclass(frozen=True)
class Tiles:
    """Hold which tiles a kernel visits.

    Attributes:
        runs: (lo, full_lo, full_hi, hi) of each program, as the kernel reads it.
        others: number of tiles of the loop.
    """

    runs: list[list[int]]
    others: int

    def colors(self, program: int) -> list[tuple[int, int, str]]:
        """Return (first, stop, color) of the runs of a program's tiles, without empty ones."""
        ends = [0, *self.runs[program], self.others]
        runs = zip(ends, ends[1:], (HIDDEN, MASKED, WHOLE, MASKED, HIDDEN), strict=False)
        return [(first, stop, color) for first, stop, color in runs if first < stop]

    def visited(self) -> int:
        """Return how many tiles all programs visit."""
        return sum(hi - lo for lo, _, _, hi in self.runs)

    def masked(self) -> int:
        """Return how many of the visited tiles are masked."""
        return sum(hi - lo - (full_hi - full_lo) for lo, full_lo, full_hi, hi in self.runs)


def make_band(queries: Tensor, keys: Tensor, borders: Sequence[int] | None = None) -> Band:
    """Return the numbers of queries and keys, and the first token of each query's document."""
    cu_seqlens = None if borders is None else torch.tensor(borders)
    starts = document_starts(cu_seqlens, queries, int(queries.max()) + 1)
    return band_of(queries, starts, keys)


def rows_of_tiles(band: Band, block_m: int, block_n: int) -> Tiles:
    """Return the tiles of the kernels whose programs own queries: forward and dq."""
    table = key_ranges(band, block_m, block_n, device_stream(torch.empty(0)))
    return Tiles(table.tolist(), -(-len(band.k_idx.values) // block_n))


def columns_of_tiles(band: Band, block_m: int, block_n: int) -> Tiles:
    """Return the tiles of the kernel whose programs own keys: dk and dv."""
    table = query_ranges(band, block_m, block_n, device_stream(torch.empty(0)))
    return Tiles(table.tolist(), -(-len(band.q_idx.values) // block_m))


def text(x: float, y: float, words: str, anchor: str = "start", size: int = 12) -> str:
    """Return a line of text."""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" '
        f'fill="{TEXT}">{words}</text>'
    )


def box(x: float, y: float, width: float, height: float, color: str) -> str:
    """Return a rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{color}"/>'


def grid(tiles: Tiles, x: float, y: float, size: tuple[float, float], columns: bool) -> list[str]:
    """Return all tiles, with white lines between them.

    Args:
        tiles: the tiles of every program.
        x, y: the first tile's upper left corner.
        size: width and height of a tile.
        columns: whether a program is a column, not a row.
    """
    width, height = size
    shapes = []
    for program in range(len(tiles.runs)):
        for first, stop, color in tiles.colors(program):
            if columns:
                top, tall = y + first * height, (stop - first) * height
                shapes.append(box(x + program * width, top, width, tall, color))
            else:
                left, wide = x + first * width, (stop - first) * width
                shapes.append(box(left, y + program * height, wide, height, color))
    across, down = (len(tiles.runs), tiles.others)[:: 1 if columns else -1]
    lines = [f"M{x + i * width:g} {y:g}v{down * height:g}" for i in range(across + 1)]
    lines += [f"M{x:g} {y + i * height:g}h{across * width:g}" for i in range(down + 1)]
    return [*shapes, f'<path d="{"".join(lines)}" stroke="#ffffff"/>']


def legend(x: float, y: float) -> list[str]:
    """Return what the colors mean, in one line."""
    shapes = []
    for color, words in LEGEND:
        shapes += [box(x, y, 14, 14, color), text(x + 20, y + 12, words)]
        x += 175
    return shapes


def picture(width: float, height: float, title: str, shapes: Sequence[str]) -> str:
    """Return an SVG file with a white ground."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" font-family="sans-serif" role="img">'
    )
    ground = f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>'
    return "\n".join((head, f"<title>{title}</title>", ground, *shapes, "</svg>", ""))


def draw_rows(tiles: Tiles, block_m: int, block_n: int, title: str) -> str:
    """Draw programs as rows, each with its run of key tiles and the number of tiles visited."""
    left, top, scale = 150, 70, 0.42
    width, height = block_n * scale, block_m * scale
    shapes = [text(left, 24, title, size=15), *legend(left, 34)]
    shapes += grid(tiles, left, top, (width, height), columns=False)
    for row, (lo, full_lo, full_hi, hi) in enumerate(tiles.runs):
        y = top + row * height
        # The kernel counts programs from the last tile of queries on.
        name = f"program {len(tiles.runs) - 1 - row}: tile {row}"
        shapes.append(text(left - 8, y + height / 2 + 4, name, "end"))
        words = f"{lo}, {full_lo}, {full_hi}, {hi}"
        shapes.append(text(left + tiles.others * width + 10, y + height / 2 + 4, words))
    bottom, right = top + len(tiles.runs) * height, left + tiles.others * width
    shapes.append(text(right + 10, top - 8, "lo, full_lo, full_hi, hi"))
    for tile in range(tiles.others):
        shapes.append(text(left + (tile + 0.5) * width, bottom + 15, f"{tile}", "middle", 10))
    shapes.append(text(right + 10, bottom + 15, "key tile"))
    words = f"key tiles of {block_n}; query tiles of {block_m}; {count_words(tiles)}"
    shapes.append(text(left, bottom + 34, words))
    return picture(right + 165, bottom + 48, title, shapes)


def draw_columns(tiles: Tiles, block_m: int, block_n: int, title: str) -> str:
    """Draw programs as columns, each with its run of query tiles."""
    left, top, scale = 150, 70, 0.42
    width, height = block_n * scale, block_m * scale
    shapes = [text(left, 24, title, size=15), *legend(left, 34)]
    shapes += grid(tiles, left, top, (width, height), columns=True)
    bottom, right = top + tiles.others * height, left + len(tiles.runs) * width
    for row in range(tiles.others):
        shapes.append(text(left - 8, top + (row + 0.5) * height + 4, f"query tile {row}", "end"))
    for column in range(len(tiles.runs)):
        x = left + column * width
        shapes.append(text(x + width / 2, bottom + 15, f"{column}", "middle", 10))
    shapes.append(text(right + 10, bottom + 15, "program: tile of keys"))
    words = f"key tiles of {block_n}; query tiles of {block_m}; {count_words(tiles)}"
    shapes.append(text(left, bottom + 34, words))
    return picture(right + 165, bottom + 48, title, shapes)


def count_words(tiles: Tiles) -> str:
    """Return how many tiles there are, are visited and are masked."""
    every = len(tiles.runs) * tiles.others
    return f"{tiles.visited()} of {every} tiles visited, {tiles.masked()} of them masked"


def draw_ring(kinds: Sequence[str], block_m: int, block_n: int, title: str) -> str:
    """Draw, for layouts of tokens on ranks, the tiles that each rank visits in each rank's keys."""
    scale, top, gap, left = 0.13, 104, 10, 70
    side = 2 * SEQLEN // RANKS * scale + gap
    size = (block_n * scale, block_m * scale)
    # Two layouts stand side by side.
    across, down = RANKS * side + 165, RANKS * side + 66
    shapes = [text(left, 24, title, size=15), *legend(left, 34)]
    for number, kind in enumerate(kinds):
        x0, y0 = left + number % 2 * across, top + number // 2 * down
        shapes.append(text(x0, y0 - 28, kind, size=14))
        for owner in range(RANKS):
            x = x0 + owner * side + (side - gap) / 2
            shapes.append(text(x, y0 - 8, f"keys of {owner}", "middle"))
        layout = ContextLayout(kind, 2 * SEQLEN, RANKS)
        for rank in range(RANKS):
            y, visited = y0 + rank * side, 0
            shapes.append(text(x0 - 8, y + side / 2, f"rank {rank}", "end"))
            for owner in range(RANKS):
                band = make_band(layout.positions(rank), layout.positions(owner))
                tiles = rows_of_tiles(band, block_m, block_n)
                visited += tiles.visited()
                shapes += grid(tiles, x0 + owner * side, y, size, columns=False)
            shapes.append(text(x0 + RANKS * side, y + side / 2, f"{visited} tiles"))
    rows = -(-len(kinds) // 2)
    return picture(left + 2 * across - 90, top + rows * down - 50, title, shapes)


def draw_all() -> dict[str, str]:
    """Return every picture of the page by the name of its file."""
    numbers = torch.arange(SEQLEN)
    causal, packed = make_band(numbers, numbers), make_band(numbers, numbers, BORDERS)
    borders = ", ".join(f"{border:,}" for border in BORDERS)
    return {
        "causal.svg": draw_rows(
            rows_of_tiles(causal, *FWD_TILE),
            *FWD_TILE,
            f"Forward, {SEQLEN:,} tokens: one program, one row of tiles",
        ),
        "documents.svg": draw_rows(
            rows_of_tiles(packed, *FWD_TILE),
            *FWD_TILE,
            f"Forward, three documents with borders {borders}",
        ),
        "columns.svg": draw_columns(
            columns_of_tiles(causal, *DKV_TILE),
            *DKV_TILE,
            f"dk and dv, {SEQLEN:,} tokens: one program, one column of tiles",
        ),
        "ring.svg": draw_ring(
            ("contiguous", "zigzag", "striped"),
            *FWD_TILE,
            f"Forward, {2 * SEQLEN:,} tokens on {RANKS} context-parallel ranks",
        ),
    }


def main(words: Sequence[str]) -> None:
    """Write every picture into a folder."""
    folder = Path(words[0]) if words else Path(__file__).parent / "tiles"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in draw_all().items():
        (folder / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
