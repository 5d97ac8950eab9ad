"""Every kernel compiles for Ampere and Hopper and fits them, seen without a GPU."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.kernels.tiers import tiered

ROOT = Path(__file__).parent.parent.parent

FULL = """
import torch
from lcdist_kernels.full import kernel
from tests.kernels.compiling import SHARED, compiled_for

index = torch.arange(300)
documents = 100 * (index // 100)
for head_dim, dtype, starts in (
    (64, torch.bfloat16, torch.zeros_like(index)),
    (80, torch.float16, documents),
):
    q, k = (torch.zeros(1, 300, n, head_dim, dtype=dtype) for n in (4, 2))
    band = (index, starts, index, 0.25)
    with compiled_for(CAPABILITY) as made:
        out, lse = kernel.full_fwd(q, k, k, *band)
        kernel.full_bwd(q, q, k, k, out, lse, *band, grad_dtype=dtype)
    assert len(made) == 3
    for each in made:
        assert each.metadata.shared <= SHARED[CAPABILITY], each.metadata
"""

SCCA = """
import torch
from lcdist_kernels import scca_attention
from lcdist_kernels.full import piece_splits
from lcdist_kernels.full import TRITON_IMPL
from lcdist_kernels.scca import Parts, Rule, banded_bwd, banded_fwd, window_parts
from tests.kernels.compiling import SHARED, compiled_for

q, k, v = (torch.zeros(1, 300, n, 80, dtype=torch.float16, requires_grad=True) for n in (4, 2, 2))
# With parts of dk and dv, which a kernel adds.
piece_splits.FEWEST_KEYS = 1
rules = (Rule("fold", 64, 64), Rule("chunk", 64, 32), Rule("pair", 2, 0), Rule("pair", 4, 1))
with compiled_for(CAPABILITY) as made:
    scca_attention(q, k, v, rules=rules, impl="triton").backward(torch.zeros_like(q))
assert len(made) == 4
# Heads as columns of a wider tensor.
columns, every = torch.zeros(1, 300, 2, 4, 80, dtype=torch.float16), slice(None)
index = torch.arange(300)
q, k, v = columns[:, :, :, :2], columns[:, :, :, 2], columns[:, :, :, 3]
band = (Rule("chunk", 64), (every, every, every), index, 0 * index, index, TRITON_IMPL)
parts = Parts(window_parts(*band))
piece_splits.FEWEST_KEYS = 8192
with compiled_for(CAPABILITY) as apart:
    row = banded_fwd(q, k, v, parts, 0.3, impl=TRITON_IMPL)
    banded_bwd(q, q, k, v, row, parts, torch.zeros_like(row[0]), 0.3, impl=TRITON_IMPL)
assert len(apart) == 3
made += apart
for each in made:
    assert each.metadata.shared <= SHARED[CAPABILITY], each.metadata
"""


ROTARY = """
import torch
from lcdist_kernels import Rotary
from lcdist_kernels.qkv import QkvShape, kernel
from lcdist_kernels.rotary_kernel import rotate, turns
from tests.kernels.compiling import compiled_for

with compiled_for(CAPABILITY) as made:
    for head_dim, dtype in ((128, torch.bfloat16), (80, torch.float32)):
        positions = torch.arange(300)
        rotate(torch.zeros(1, 300, 4, head_dim, dtype=dtype), positions,
               turns(torch.ones(head_dim // 2)), 1)
        shape, mixed = QkvShape(2, 3, head_dim), torch.zeros(300, 1, 10 * head_dim, dtype=dtype)
        for rotary in (None, Rotary(torch.ones(head_dim // 2))):
            qkv = kernel.split_by_kernel(mixed, shape, rotary, positions)
            kernel.join_by_kernel(qkv, shape, rotary, positions)
assert len(made) == 10
"""

NORMAL = """
import torch
from lcdist_kernels.normal import Shard
from lcdist_kernels.normal.kernel import fill_
from tests.kernels.compiling import compiled_for

with compiled_for(CAPABILITY) as made:
    for columns, dtype in ((2048, torch.bfloat16), (70, torch.float32)):
        fill_(torch.zeros(6, columns, dtype=dtype), Shard(3, 6, 3, columns), 2**62 + 1, 0.02)
assert len(made) == 2
"""

TENSORIZED = """
import torch
from lcdist_kernels import tensorized_attention
from lcdist_kernels.tensorized import ModeGrid
from tests.kernels.compiling import SHARED, compiled_for

grid, head_dim, dtype, kernels = ModeGrid((32, 2), hop_heads="kv"), 80, torch.float16, 13
q, k, v = (torch.zeros(1, 512, n, head_dim, dtype=dtype, requires_grad=True) for n in (4, 2, 2))
with compiled_for(CAPABILITY) as made:
    out = tensorized_attention(q, k, v, grid=grid, impl="triton")
    out.backward(torch.zeros_like(out))
assert len(made) == kernels, len(made)
for each in made:
    assert each.metadata.shared <= SHARED[CAPABILITY], each.metadata
"""


COCA = """
import torch
from lcdist_kernels import Rotary
from lcdist_kernels.coca import TRITON_IMPL, VARIANTS, rotary_angles
from tests.kernels.compiling import compiled_for

with compiled_for(CAPABILITY) as made:
    for head_dim, dtype in ((128, torch.bfloat16), (80, torch.float32)):
        q = torch.zeros(1, 300, 4, head_dim, dtype=dtype)
        tau = torch.zeros(1, 300, 2, head_dim // 2, dtype=torch.float32)
        at = rotary_angles(Rotary(torch.ones(head_dim // 2)), torch.arange(300), q, head_dim)
        for variant in VARIANTS:
            TRITON_IMPL.queries(q, at, variant)
            TRITON_IMPL.queries_bwd(q, q, at, variant)
            TRITON_IMPL.keys(tau, at, variant)
            TRITON_IMPL.keys_bwd(q, at, variant)
            TRITON_IMPL.factors(q, q[:, :, :2], at, variant)
            TRITON_IMPL.factors_bwd(q, q[:, :, :2], q, tau, at, variant)
assert len(made) == 24
"""


SWIGLU = """
import torch
from lcdist_kernels.swiglu import kernel
from tests.kernels.compiling import compiled_for

with compiled_for(CAPABILITY) as made:
    for width, dtype in ((8192, torch.bfloat16), (300, torch.float16), (70, torch.float32)):
        gate_up, dz = torch.zeros(5, 2 * width, dtype=dtype), torch.zeros(5, width, dtype=dtype)
        kernel.fwd(gate_up)
        kernel.bwd_(gate_up, dz)
        kernel.bwd_(gate_up, dz, again=True)
assert len(made) == 9
"""


VOCAB_LOSS = """
import torch
from lcdist_kernels.vocab_loss import kernel
from tests.kernels.compiling import compiled_for

targets, rows = torch.zeros(3, dtype=torch.int64), torch.zeros(3)
with compiled_for(CAPABILITY) as made:
    for dtype, columns, first, real in (
        (torch.bfloat16, 128256, 0, 128256),
        (torch.float16, 6400, 6400, 5000),
        (torch.float32, 77, 1, 33),
    ):
        logits = torch.zeros(3, columns, dtype=dtype)
        kernel.stats(logits, targets, first, real)
        kernel.grad_(logits, targets, rows, rows, first, real)
assert len(made) == 6
"""


NORM = """
import torch
from lcdist_kernels.norm import kernel
from tests.kernels.compiling import compiled_for

with compiled_for(CAPABILITY) as made:
    for rows, width, dtype in (
        (5, 2048, torch.bfloat16),
        (1100, 5000, torch.float16),
        (600, 70, torch.float32),
    ):
        shapes = (rows, width), width, (rows, 1)
        x, weight, rstd = (torch.zeros(shape, dtype=dtype) for shape in shapes)
        for delta in (x, None):
            kernel.fwd(x, delta, weight, 1e-5)
            kernel.bwd(x, rstd.float(), weight, x, delta, delta is None)
        kernel.scale(x, rstd.float(), weight)
assert len(made) == 18
"""


ADAMW = """
import torch
from lcdist_kernels.adamw import Hyper, Tensors, kernel
from tests.kernels.compiling import compiled_for

totals, hyper = torch.ones(4, dtype=torch.float64), Hyper(1e-3, 0.9, 0.95, 1e-8, 1, 1.0)
with compiled_for(CAPABILITY) as made:
    for dtype in (torch.bfloat16, torch.float16, None):
        wide = [torch.zeros(5000) for _ in range(4)]
        low = [None if dtype is None else torch.zeros(5000, dtype=dtype)]
        kernel.update(Tensors(*([x] for x in wide), low, [0.1], [1.0]), totals, hyper)
assert len(made) == 3
for each in made:
    # Whole tiles move four numbers of fp32 at a time, and no value goes to another thread.
    assert not each.metadata.shared
    assert "ld.global.v4" in each.asm["ptx"] and "st.global.v4" in each.asm["ptx"]
"""


DECODE = """
import torch
from lcdist_kernels.decode import decode_blocks, decode_fwd
from tests.kernels.compiling import SHARED, compiled_for

with compiled_for(CAPABILITY) as made:
    for dtype, head_dim, heads in (
        (torch.bfloat16, 128, (32, 8)), (torch.float16, 80, (4, 4)), (torch.float32, 64, (8, 1)),
    ):
        q, k = torch.zeros(2, heads[0], head_dim, dtype=dtype), torch.zeros(
            2, 4096, heads[1], head_dim, dtype=dtype
        )
        decode_fwd(q, k, k, [(0, 0, 4096), (1, 3, 7)], 0.25)
        table = torch.zeros(9, 2, 64, head_dim, dtype=dtype)
        ids = torch.zeros(2, heads[1], 8, dtype=torch.int32)
        decode_blocks(q, table, ids, 0.25)
assert len(made) == 12
for each in made:
    assert each.metadata.shared <= SHARED[CAPABILITY], each.metadata
    assert "st.local" not in each.asm["ptx"], each.metadata.name
"""


PROGRAMS = {
    "full": FULL,
    "decode": DECODE,
    "scca": SCCA,
    "rotary": ROTARY,
    "normal": NORMAL,
    "tensorized": TENSORIZED,
    "coca": COCA,
    "swiglu": SWIGLU,
    "vocab_loss": VOCAB_LOSS,
    "norm": NORM,
    "adamw": ADAMW,
}


# Programs whose compilations take seconds each, and the others.
PRODUCTS = ("full", "tensorized", "scca")
MAPS = tuple(name for name in PROGRAMS if name not in PRODUCTS)


def compiles(programs: Sequence[str], capability: int, cache: Path) -> None:
    """Fails unless the programs, which compile kernels for sm_CAPABILITY, end well.

    They run in one process, because a process starts in as long as it compiles some kernels.
    """
    roots = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": roots, "TRITON_CACHE_DIR": str(cache)}
    program = "".join(programs).replace("CAPABILITY", str(capability))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert not done.returncode, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "capability"),
    # For sm_90 `test_machine_code.py` compiles those that are left out here.
    tiered(
        [
            (("rotary",), 90),
            (tuple(name for name in MAPS if name != "rotary"), 90),
            (MAPS, 80),
            (PRODUCTS, 80),
        ],
        {0},
    ),
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_kernels_compile(names: tuple[str, ...], capability: int, tmp_path: Path) -> None:
    compiles([PROGRAMS[name] for name in names], capability, tmp_path)
