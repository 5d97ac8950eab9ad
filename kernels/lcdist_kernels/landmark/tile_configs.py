"""Tile sizes of landmark attention's kernels by head_dim, element size and GPU.

The tables with LARGE are for blocks that do not fit a tile of the others, those with WIDE for
blocks of 65 to 128 tokens. Chosen by instructions per score, registers and shared memory as
compiled for sm_80 and sm_90. Times on an H100 are of the tables without HOPPER, at head_dim 128 in
bf16 only.
"""

from typing import NamedTuple

from lcdist_kernels.triton_common import Launch, LaunchTable, launch_table

FWD = launch_table(
    half=[(128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 8, 1)],
    single=[(32, 64, 4, 1), (32, 64, 8, 1), (16, 32, 8, 1)],
)
FWD_HOPPER = {(128, 2): Launch(128, 128, 8, 2)}
FWD_LARGE = launch_table(
    half=[(128, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2)],
    single=[(32, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1)],
)
FWD_LARGE_HOPPER = {(128, 2): Launch(128, 64, 8, 2)}
BWD_DQ = launch_table(
    half=[(128, 64, 8, 2), (128, 64, 8, 2), (32, 64, 8, 1)],
    single=[(32, 64, 8, 1), (16, 64, 8, 1), (16, 16, 4, 1)],
)
# By descriptors, which leave registers for it.
BWD_DQ_DESCRIBED = {(128, 2): Launch(128, 128, 8, 2)}
BWD_DQ_WIDE_HOPPER = {(64, 2): Launch(128, 128, 8, 1), (128, 2): Launch(128, 128, 8, 1)}
BWD_DQ_LARGE = launch_table(
    half=[(64, 64, 8, 2), (64, 64, 8, 1), (32, 32, 8, 1)],
    single=[(32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)],
)
BWD_DQ_LARGE_HOPPER = {(64, 2): Launch(128, 64, 8, 2), (128, 2): Launch(128, 64, 8, 1)}
BWD_DKV = launch_table(
    half=[(64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 1)],
    single=[(32, 64, 8, 1), (16, 64, 8, 1), (16, 16, 8, 1)],
)
BWD_DKV_HOPPER = {(64, 2): Launch(64, 64, 4, 2), (128, 2): Launch(128, 64, 8, 2)}
BWD_DKV_WIDE_HOPPER = {(64, 2): Launch(128, 128, 8, 1), (128, 2): Launch(128, 128, 8, 1)}
BWD_DKV_LARGE = launch_table(
    half=[(64, 64, 8, 1), (32, 64, 8, 1), (16, 32, 8, 1)],
    single=[(16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)],
)
BWD_DKV_LARGE_HOPPER = {(64, 2): Launch(128, 64, 8, 1), (128, 2): Launch(128, 64, 8, 1)}
# Costs of past blocks. Nothing else chooses tiles, so that a row's cost has the same bits anywhere.
TOP_K = launch_table(
    half=[(128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2)],
    single=[(32, 64, 4, 1), (32, 64, 8, 1), (16, 32, 8, 1)],
)


class BlockTables(NamedTuple):
    """Tables of one kernel: for blocks that fit a tile, and for larger ones.

    Entries of `hopper` and `large_hopper` replace those of `small` and `large` on Hopper, those of
    `described` where tiles come by descriptors, as those of lists do only where there is such an
    entry; `wide_hopper` is for blocks of twice the tile, where Ampere halves the tile of queries.
    """

    small: LaunchTable
    large: LaunchTable
    hopper: LaunchTable
    large_hopper: LaunchTable
    wide_hopper: LaunchTable
    described: LaunchTable


FWD_TABLES = BlockTables(FWD, FWD_LARGE, FWD_HOPPER, FWD_LARGE_HOPPER, {}, FWD_HOPPER)
BWD_DQ_TABLES = BlockTables(
    BWD_DQ, BWD_DQ_LARGE, {}, BWD_DQ_LARGE_HOPPER, BWD_DQ_WIDE_HOPPER, BWD_DQ_DESCRIBED
)
BWD_DKV_TABLES = BlockTables(
    BWD_DKV, BWD_DKV_LARGE, BWD_DKV_HOPPER, BWD_DKV_LARGE_HOPPER, BWD_DKV_WIDE_HOPPER, {}
)
