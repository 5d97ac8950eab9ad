"""Tile sizes of full attention's kernels by head_dim, element size and GPU.

Chosen by instructions per score, spilled registers and shared memory as compiled for sm_80 and
sm_90. Measured on an H100 at head_dim 128 in bf16 only (`kernels/bench/results`).
"""

from lcdist_kernels.triton_common import Launch, launch_table

FWD = launch_table(
    half=[(128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 2)],
    single=[(32, 32, 4, 2), (32, 64, 8, 1), (32, 32, 8, 1)],
)
FWD_HOPPER = {(128, 2): Launch(128, 128, 8, 2)}
BWD_DQ = launch_table(
    half=[(128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)],
    single=[(64, 32, 8, 2), (32, 32, 8, 2), (16, 16, 4, 1)],
)
# BWD_DQ_HOPPER and BWD_DKV_HOPPER are for tiles by descriptors: by pointers they would spill.
BWD_DQ_HOPPER = {(128, 2): Launch(128, 128, 8, 2)}
BWD_DKV = launch_table(
    half=[(64, 128, 8, 3), (64, 128, 8, 2), (32, 64, 8, 2)],
    single=[(32, 32, 4, 2), (32, 32, 8, 1), (16, 16, 4, 1)],
)
BWD_DKV_HOPPER = {(128, 2): Launch(64, 128, 8, 3)}
