"""Tile sizes of LSSA's and LSSAR's kernels by head_dim, element size and GPU.

Two accumulators and several factors per score leave few registers, so tiles are smaller than full
attention's. Chosen by spilled registers and shared memory as compiled for sm_80 and sm_90; measured
on an H100 at head_dim 128 in bf16 only.
"""

from lcdist_kernels.triton_common import Launch

SUMS = {
    (64, 2): Launch(128, 64, 4, 3),
    (128, 2): Launch(128, 64, 8, 3),
    (256, 2): Launch(128, 32, 8, 2),
    (64, 4): Launch(32, 32, 4, 2),
    (128, 4): Launch(32, 64, 8, 1),
    (256, 4): Launch(32, 32, 8, 1),
}
FWD = {
    (64, 2): Launch(128, 32, 8, 3),
    (128, 2): Launch(64, 64, 8, 2),
    (256, 2): Launch(64, 32, 8, 2),
    (64, 4): Launch(32, 32, 4, 2),
    (128, 4): Launch(32, 32, 8, 1),
    (256, 4): Launch(16, 32, 8, 1),
}
FWD_HOPPER = {(64, 2): Launch(128, 64, 8, 3), (128, 2): Launch(128, 64, 8, 2)}
BWD_DQ = {
    (64, 2): Launch(128, 64, 8, 3),
    (128, 2): Launch(128, 64, 8, 2),
    (256, 2): Launch(64, 32, 8, 2),
    (64, 4): Launch(64, 32, 8, 2),
    (128, 4): Launch(32, 32, 8, 2),
    (256, 4): Launch(16, 16, 4, 1),
}
BWD_DKV = {
    (64, 2): Launch(32, 128, 8, 3),
    (128, 2): Launch(64, 64, 8, 2),
    (256, 2): Launch(32, 32, 8, 2),
    (64, 4): Launch(32, 32, 8, 1),
    (128, 4): Launch(16, 32, 8, 1),
    (256, 4): Launch(16, 16, 4, 1),
}
BWD_DKV_HOPPER = {(128, 2): Launch(32, 128, 8, 2)}
