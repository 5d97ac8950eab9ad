"""Tile sizes of LSSA's and LSSAR's kernels by head_dim, element size and GPU.

Two accumulators and several factors per score leave few registers, so tiles are smaller than full
attention's. Chosen by instructions per score, spilled registers and shared memory as compiled for
sm_80 and sm_90; measured on an H100 at head_dim 128 in bf16 only, before descriptors.
"""

from lcdist_kernels.triton_common import Launch, launch_table

SUMS = launch_table(
    half=[(128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 2)],
    single=[(32, 32, 4, 2), (32, 64, 8, 1), (32, 32, 8, 1)],
)
# A thread takes one logarithm of its columns of a tile, and two programs still fit an SM.
SUMS_HOPPER = {(64, 2): Launch(128, 128, 8, 2), (128, 2): Launch(128, 128, 8, 2)}
FWD = launch_table(
    half=[(128, 32, 8, 3), (64, 64, 8, 2), (64, 32, 8, 2)],
    single=[(32, 32, 4, 2), (32, 32, 8, 1), (16, 32, 8, 1)],
)
FWD_HOPPER = {(64, 2): Launch(128, 64, 8, 3), (128, 2): Launch(128, 64, 8, 2)}
BWD_DQ = launch_table(
    half=[(128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)],
    single=[(64, 32, 8, 2), (32, 32, 8, 2), (16, 16, 4, 1)],
)
BWD_DKV = launch_table(
    half=[(32, 128, 8, 3), (64, 64, 8, 2), (32, 32, 8, 2)],
    single=[(32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)],
)
BWD_DKV_HOPPER = {(128, 2): Launch(32, 128, 8, 2)}
# By descriptors, which leave registers for it.
BWD_DKV_DESCRIBED = {(64, 2): Launch(64, 128, 8, 2)}
