"""Tile sizes of landmark attention's kernels by head_dim and element size.

The tables ending in LARGE are for blocks that do not fit a tile of the others. Chosen by registers
and shared memory as compiled for sm_80 and sm_90; measured on an H100 at head_dim 128 in bf16 only.
On sm_90 the kernels for dk and dv spill 512 bytes per thread at head_dim 128: start tuning there.
"""

from lcdist_kernels.triton_common import Launch

FWD = {
    (64, 2): Launch(128, 64, 4, 3),
    (128, 2): Launch(128, 64, 8, 3),
    (256, 2): Launch(64, 64, 8, 1),
    (64, 4): Launch(32, 64, 4, 1),
    (128, 4): Launch(32, 64, 8, 1),
    (256, 4): Launch(16, 32, 8, 1),
}
FWD_LARGE = {
    (64, 2): Launch(128, 64, 8, 2),
    (128, 2): Launch(64, 64, 8, 2),
    (256, 2): Launch(32, 32, 8, 2),
    (64, 4): Launch(32, 32, 4, 1),
    (128, 4): Launch(16, 32, 8, 1),
    (256, 4): Launch(16, 16, 8, 1),
}
BWD_DQ = {
    (64, 2): Launch(128, 64, 8, 2),
    (128, 2): Launch(128, 64, 8, 2),
    (256, 2): Launch(32, 64, 8, 1),
    (64, 4): Launch(32, 64, 8, 1),
    (128, 4): Launch(16, 64, 8, 1),
    (256, 4): Launch(16, 16, 4, 1),
}
BWD_DQ_LARGE = {
    (64, 2): Launch(64, 64, 8, 2),
    (128, 2): Launch(64, 64, 8, 1),
    (256, 2): Launch(32, 32, 8, 1),
    (64, 4): Launch(32, 32, 8, 1),
    (128, 4): Launch(16, 32, 8, 1),
    (256, 4): Launch(16, 16, 4, 1),
}
BWD_DKV = {
    (64, 2): Launch(64, 64, 8, 2),
    (128, 2): Launch(64, 64, 8, 2),
    (256, 2): Launch(32, 64, 8, 1),
    (64, 4): Launch(32, 64, 8, 1),
    (128, 4): Launch(16, 64, 8, 1),
    (256, 4): Launch(16, 16, 8, 1),
}
BWD_DKV_LARGE = {
    (64, 2): Launch(64, 64, 8, 1),
    (128, 2): Launch(32, 64, 8, 1),
    (256, 2): Launch(16, 32, 8, 1),
    (64, 4): Launch(16, 32, 8, 1),
    (128, 4): Launch(16, 16, 8, 1),
    (256, 4): Launch(16, 16, 4, 1),
}
# Costs of past blocks. Nothing else chooses tiles, so that a row's cost has the same bits anywhere.
TOP_K = {
    (64, 2): Launch(128, 64, 4, 3),
    (128, 2): Launch(128, 64, 8, 3),
    (256, 2): Launch(64, 64, 4, 2),
    (64, 4): Launch(32, 64, 4, 1),
    (128, 4): Launch(32, 64, 8, 1),
    (256, 4): Launch(16, 32, 8, 1),
}
