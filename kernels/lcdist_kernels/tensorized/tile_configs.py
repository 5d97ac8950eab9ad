"""Tiles of tensorized attention's kernels by head_dim and element size: the one place to tune them.

Where a sweep forks there are two accumulators, and a backward step has up to six products, so tiles
are smaller than those of full attention. Chosen by spilled registers and shared memory as compiled
for sm_80 and sm_90; unmeasured.
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
