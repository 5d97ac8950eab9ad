"""Tile sizes of tensorized attention's kernels by head_dim, element size and GPU.

A sweep of branch and hop has two accumulators and four products in a step of dq, so tiles are
smaller than full attention's. The tables with FORK are for such sweeps, those with HOP for a hop
alone. Chosen by instructions per score, spilled registers and shared memory as compiled for sm_80
and sm_90. Times on an H100 are of the tables without HOPPER, at head_dim 128 in bf16 only.
"""

from typing import NamedTuple

from lcdist_kernels.triton_common import Launch, LaunchTable, launch_table

FWD = launch_table(
    half=[(128, 64, 8, 3), (64, 64, 8, 3), (64, 32, 8, 2)],
    single=[(32, 32, 4, 2), (16, 32, 8, 1), (16, 16, 4, 1)],
)
FWD_HOPPER = {(128, 2): Launch(128, 128, 8, 2)}
# By descriptors, where queries are means or rotated: they stay in registers.
FWD_COMPUTED_DESCRIBED = {(128, 2): Launch(128, 64, 8, 3)}
FWD_FORK_HOPPER = {(128, 2): Launch(128, 64, 8, 3)}
BWD_DQ = launch_table(
    half=[(64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2)],
    single=[(32, 32, 8, 2), (16, 32, 8, 1), (16, 16, 4, 1)],
)
BWD_DQ_HOPPER = {(64, 2): Launch(128, 64, 8, 2), (128, 2): Launch(128, 64, 8, 2)}
# By descriptors, which leave registers for it. By narrower tiles every product would have a wait.
BWD_DQ_DESCRIBED = {(64, 2): Launch(128, 128, 8, 2), (128, 2): Launch(128, 128, 8, 2)}
BWD_DKV = launch_table(
    half=[(32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)],
    single=[(32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)],
)
BWD_DKV_HOPPER = {(64, 2): Launch(64, 128, 8, 2), (128, 2): Launch(64, 128, 8, 2)}
BWD_DKV_HOP_HOPPER = {(64, 2): Launch(64, 128, 8, 2), (128, 2): Launch(64, 64, 4, 2)}


class QueryTables(NamedTuple):
    """Tables of a kernel that owns queries.

    Entries of `hopper` replace those of `ampere` on Hopper, those of `described` where keys come by
    descriptors too.
    """

    ampere: LaunchTable
    hopper: LaunchTable
    described: LaunchTable


FWD_TABLES = QueryTables(FWD, FWD_HOPPER, {})
FWD_COMPUTED_TABLES = QueryTables(FWD, FWD_HOPPER, FWD_COMPUTED_DESCRIBED)
FWD_FORK_TABLES = QueryTables(FWD, FWD_FORK_HOPPER, {})
BWD_DQ_TABLES = QueryTables(BWD_DQ, BWD_DQ_HOPPER, BWD_DQ_DESCRIBED)
