"""Tile sizes of tensorized attention's kernels by head_dim and element size.

A forking sweep has two accumulators and a backward step up to six products, so tiles are smaller
than full attention's. Chosen by spilled registers and shared memory as compiled for sm_80 and
sm_90; measured on an H100 at head_dim 128 in bf16 only.
"""

from lcdist_kernels.triton_common import Launch

FWD = {
    (64, 2): Launch(128, 64, 8, 3),
    (128, 2): Launch(64, 64, 8, 3),
    (256, 2): Launch(64, 32, 8, 2),
    (64, 4): Launch(32, 32, 4, 2),
    (128, 4): Launch(16, 32, 8, 1),
    (256, 4): Launch(16, 16, 4, 1),
}
BWD_DQ = {
    (64, 2): Launch(64, 64, 8, 2),
    (128, 2): Launch(64, 64, 8, 2),
    (256, 2): Launch(32, 32, 8, 2),
    (64, 4): Launch(32, 32, 8, 2),
    (128, 4): Launch(16, 32, 8, 1),
    (256, 4): Launch(16, 16, 4, 1),
}
BWD_DKV = {
    (64, 2): Launch(32, 64, 8, 2),
    (128, 2): Launch(32, 64, 8, 2),
    (256, 2): Launch(32, 32, 8, 1),
    (64, 4): Launch(32, 32, 8, 1),
    (128, 4): Launch(16, 32, 8, 1),
    (256, 4): Launch(16, 16, 4, 1),
}
