"""Main kernels as compiled for sm_90: instructions per score, spills, waits and wgmma shapes.

bf16, head_dim 128 unless a program says another. Limits are per score of a tile that needs no mask,
for Triton 3.6, which torch 2.11 brings, and for full attention also for later versions, whose
counts differ by up to 15 %.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import triton

from tests.kernels.compiling import SHARED

ROOT = Path(__file__).parent.parent.parent
# What torch 2.11 brings.
OLDER = "triton==3.6.0"

START = """
import torch
from tests.kernels.compiling import compiled_for
from tests.kernels.machine_code import report

index = torch.arange(1024)
starts = torch.zeros_like(index)
q, k = (torch.zeros(1, 1024, n, 128, dtype=torch.bfloat16) for n in (4, 2))
row = torch.zeros(1, 4, 1024)
"""

FIBRES = """
from lcdist_kernels.tensorized import ModeGrid, fine_branch
from lcdist_kernels.tensorized.launch import branch_bwd, branch_fwd

q, row = torch.zeros(1, 1024, 8, 128, dtype=q.dtype), torch.zeros(1, 8, 1024)
branch = fine_branch(1, index, starts, index, ModeGrid((8, {}), hop_heads="kv"))
with compiled_for(90) as made:
    branch_fwd((q, k, k), branch, 0.25)
    branch_bwd(q, (q, k, k), (row, row), branch, 0.25)
report(made[:{}])
"""

PROGRAMS = {
    "full": """
from lcdist_kernels.full import kernel

band = (index, starts, index, 0.25)
with compiled_for(90) as made:
    out, lse = kernel.full_fwd(q, k, k, *band, out_dtype=q.dtype)
    kernel.full_bwd(q, q, k, k, out, lse, *band, grad_dtype=q.dtype)
report(made)
""",
    "pointers": """
from lcdist_kernels.descriptors import descriptors_set
from lcdist_kernels.full import kernel

band = (index, starts, index, 0.25)
with descriptors_set(False), compiled_for(90) as made:
    out, lse = kernel.full_fwd(q, k, k, *band, out_dtype=q.dtype)
    kernel.full_bwd(q, q, k, k, out, lse, *band, grad_dtype=q.dtype)
report(made)
""",
    "head_dim 64": """
from lcdist_kernels.full import kernel

band, (q, k) = (index, starts, index, 0.25), (x[..., :64].contiguous() for x in (q, k))
with compiled_for(90) as made:
    out, lse = kernel.full_fwd(q, k, k, *band, out_dtype=q.dtype)
    kernel.full_bwd(q, q, k, k, out, lse, *band, grad_dtype=q.dtype)
report(made)
""",
    "pieces": """
from lcdist_kernels import scca_attention
from lcdist_kernels.scca import Rule

q, k, v = (torch.zeros(1, 1024, n, 128, dtype=q.dtype, requires_grad=True) for n in (4, 2, 2))
with compiled_for(90) as made:
    rules = (Rule("chunk", 512), Rule("chunk", 512, 256)) * 2
    scca_attention(q, k, v, rules=rules, impl="triton").backward(torch.zeros_like(q))
report(made)
""",
    "landmark": """
from lcdist_kernels.landmark import TRITON_IMPL, block_grid, block_starts

grid = block_grid(None, 1024, 64)
band = (grid.rows, block_starts(1024, 64), 0.25)
with compiled_for(90) as made:
    out, lse = TRITON_IMPL.fwd(q, k, k, *band)
    TRITON_IMPL.bwd(q, q, k, k, out, lse, *band, grad_dtype=q.dtype)
report(made)
""",
    "tensorized": """
from lcdist_kernels.tensorized import ModeGrid, ModeRotary, fine_branch
from lcdist_kernels.tensorized.launch import branch_bwd, branch_fwd

branch = fine_branch(0, index, starts, index, ModeGrid((512,), hop_heads="kv"))
with compiled_for(90) as made:
    branch_fwd((q, k, k), branch, 0.25)
    branch_bwd(q, (q, k, k), (row, row), branch, 0.25)
report(made)
""",
    "tensorized 64": """
from lcdist_kernels.tensorized import ModeGrid, fine_branch
from lcdist_kernels.tensorized.launch import branch_bwd, branch_fwd

q, k = (x[..., :64].contiguous() for x in (q, k))
branch = fine_branch(0, index, starts, index, ModeGrid((512,), hop_heads="kv"))
with compiled_for(90) as made:
    branch_fwd((q, k, k), branch, 0.25)
    branch_bwd(q, (q, k, k), (row, row), branch, 0.25)
report(made)
""",
    # The finest mode in a model's call: its branch, and dk and dv of branch and hop. Kernels of the
    # coarsest come before.
    "tensorized rotated": """
from lcdist_kernels import Rotary, tensorized_attention
from lcdist_kernels.tensorized import ModeGrid

q, k, v = (torch.zeros(1, 1024, n, 128, dtype=q.dtype, requires_grad=True) for n in (8, 2, 2))
grid, rotary = ModeGrid((512,), local_blocks=2, hop_heads="kv"), Rotary(torch.ones(64))
with compiled_for(90) as made:
    out = tensorized_attention(q, k, v, grid=grid, rotary=rotary, impl="triton")
    out.backward(torch.zeros_like(q))
made = [x for x in made if "tensorized" in x.metadata.name]
report((made[2], *made[-2:]))
""",
    "hop": """
from lcdist_kernels.tensorized import ModeGrid, ModeRotary
from lcdist_kernels.tensorized.launch import hop_bwd

turning = ModeRotary(ModeGrid((512,), hop_heads="kv"), None, index, 0.25)
with compiled_for(90) as made:
    hop_bwd(k, (q, k, k), (k, row[:, :2].contiguous()), 0, turning)
report([each for each in made if "dkv" in each.metadata.name])
""",
    # Strided fibres: four or two heads share a tile of 128 rows, or a fibre has one. dk and dv of
    # the shortest have no wgmma.
    "fibres of 32": FIBRES.format(32, 2),
    "fibres of 64": FIBRES.format(64, 3),
    "fibres of 128": FIBRES.format(128, 3),
    # Of chunks and halves of chunks, the halves' kernels come last and are the ones reported.
    "short units": """
from lcdist_kernels.landmark import TRITON_IMPL, block_grid

q, row = torch.zeros(1, 1024, 8, 128, dtype=q.dtype), torch.zeros(1, 8, 1024)
chosen = torch.zeros(1, 2, 1024, 64, dtype=torch.int32)
units = (chosen, torch.ones_like(index), block_grid(None, 1024, 64).rows, 0.25)
with compiled_for(90) as made:
    TRITON_IMPL.local_fwd(q, k, k, *units)
    TRITON_IMPL.local_bwd(q, q, k, k, q, row, *units)
report(each for each in made if "sparse" in each.metadata.name)
""",
    "long units": """
from lcdist_kernels.landmark import TRITON_IMPL, block_grid

q, row = torch.zeros(1, 1024, 8, 128, dtype=q.dtype), torch.zeros(1, 8, 1024)
chosen = torch.zeros(1, 2, 1, 64, dtype=torch.int32)
units = (chosen, torch.tensor([1024]), block_grid(None, 1024, 64).rows, 0.25)
with compiled_for(90) as made:
    TRITON_IMPL.local_fwd(q, k, k, *units)
    TRITON_IMPL.local_bwd(q, q, k, k, q, row, *units)
report(made)
""",
    "lssar": """
from lcdist_kernels.lssar import TRITON_IMPL, Band, Reweight
from lcdist_kernels.lssar.tiled import RowStats

stats, band = RowStats(row, row, row, row), Band(index, starts, index)
with compiled_for(90) as made:
    TRITON_IMPL.whole(q, k, k, band, Reweight(), True)
    TRITON_IMPL.bwd(q, q, k, k, band, stats, Reweight())
report(made)
""",
}


class Most(NamedTuple):
    """Limits of a kernel.

    instructions, later: per score, with Triton 3.6 and later; later is 0 where it is not limited.
    stack: spilled bytes of a thread. local: loads and stores of them in the loop. covered: least
    share of instructions issued while a product runs.
    """

    program: str
    kernel: str
    instructions: float
    later: float
    stack: int
    local: int
    covered: float


LIMITS = [
    Most("full", "_full_fwd_kernel", 8.1, 8.4, 0, 0, 0.75),
    Most("full", "_full_bwd_dq_kernel", 7.2, 7.6, 8, 0, 0.55),
    Most("full", "_full_bwd_dkv_kernel", 12.0, 12.3, 96, 4, 0.7),
    Most("head_dim 64", "_full_fwd_kernel", 8.5, 0, 8, 0, 0.75),
    Most("head_dim 64", "_full_bwd_dq_kernel", 8.5, 0, 0, 0, 0.55),
    Most("head_dim 64", "_full_bwd_dkv_kernel", 11.2, 0, 0, 0, 0.7),
    Most("pieces", "_pieces_fwd_kernel", 8.1, 0, 24, 0, 0.75),
    Most("pieces", "_pieces_bwd_dq_kernel", 7.2, 0, 8, 0, 0.5),
    Most("pieces", "_pieces_bwd_dkv_kernel", 13.0, 0, 128, 9, 0.7),
    Most("pointers", "_full_fwd_kernel", 9.3, 0, 64, 1, 0.25),
    Most("pointers", "_full_bwd_dq_kernel", 9.5, 0, 0, 0, 0.6),
    Most("pointers", "_full_bwd_dkv_kernel", 13.1, 0, 136, 12, 0.59),
    Most("landmark", "_landmark_fwd_kernel", 10.4, 0, 8, 2, 0.7),
    Most("landmark", "_landmark_bwd_dq_kernel", 12.9, 0, 16, 0, 0.5),
    Most("landmark", "_landmark_bwd_dkv_kernel", 18.9, 0, 464, 20, 0.5),
    Most("short units", "_sparse_fwd_kernel", 12.9, 0, 64, 0, 0.85),
    Most("short units", "_sparse_bwd_dq_kernel", 16.0, 0, 64, 0, 0.65),
    Most("tensorized", "_tensorized_fwd_kernel", 7.9, 0, 0, 0, 0.75),
    Most("tensorized", "_tensorized_bwd_dq_kernel", 8.2, 0, 0, 0, 0.6),
    Most("tensorized", "_tensorized_bwd_dkv_kernel", 11.5, 0, 24, 0, 0.6),
    Most("tensorized 64", "_tensorized_fwd_kernel", 9.6, 0, 0, 0, 0.8),
    Most("tensorized 64", "_tensorized_bwd_dq_kernel", 7.7, 0, 0, 0, 0.55),
    Most("tensorized 64", "_tensorized_bwd_dkv_kernel", 11.1, 0, 0, 0, 0.6),
    Most("tensorized rotated", "_tensorized_fwd_kernel", 10.8, 0, 32, 0, 0.7),
    Most("tensorized rotated", "_tensorized_bwd_dq_kernel", 7.2, 0, 144, 0, 0.55),
    Most("tensorized rotated", "_tensorized_bwd_dkv_kernel", 11.7, 0, 352, 5, 0.55),
    Most("fibres of 32", "_tensorized_fwd_kernel", 16.8, 0, 0, 0, 0.4),
    Most("fibres of 32", "_tensorized_bwd_dq_kernel", 14.9, 0, 0, 0, 0.7),
    Most("fibres of 64", "_tensorized_fwd_kernel", 11.2, 0, 0, 0, 0.3),
    Most("fibres of 64", "_tensorized_bwd_dq_kernel", 10.7, 0, 0, 0, 0.7),
    Most("fibres of 64", "_tensorized_bwd_dkv_kernel", 11.9, 0, 80, 1, 0.6),
    Most("fibres of 128", "_tensorized_fwd_kernel", 8.2, 0, 40, 2, 0.75),
    Most("fibres of 128", "_tensorized_bwd_dq_kernel", 8.2, 0, 0, 0, 0.6),
    Most("fibres of 128", "_tensorized_bwd_dkv_kernel", 11.8, 0, 40, 0, 0.6),
    Most("hop", "_tensorized_bwd_dkv_kernel", 11.7, 0, 0, 0, 0.45),
    Most("short units", "_sparse_bwd_dkv_kernel", 21.9, 0, 80, 12, 0.6),
    Most("long units", "_sparse_fwd_kernel", 12.3, 0, 32, 0, 0.85),
    Most("long units", "_sparse_bwd_dq_kernel", 15.2, 0, 16, 0, 0.7),
    Most("long units", "_sparse_bwd_dkv_kernel", 21.8, 0, 152, 1, 0.6),
    # A second program of the SM runs beside a product: 128 registers.
    Most("lssar", "_lssar_sums_kernel", 8.6, 0, 0, 0, 0.02),
    Most("lssar", "_lssar_fwd_kernel", 23.4, 0, 40, 0, 0.9),
    Most("lssar", "_lssar_bwd_dq_kernel", 26.1, 0, 0, 0, 0.8),
    Most("lssar", "_lssar_bwd_dkv_kernel", 38.1, 0, 96, 0, 0.9),
]


@cache
def compiled(programs: tuple[str, ...], packages: str = "") -> dict[tuple[str, str], Any]:
    """Return what `machine_code.report` says of kernels, by names of program and kernel.

    programs: run in one process, because a process starts in as long as it compiles some kernels.
    packages: a folder of packages to take instead of the installed ones.
    """
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    roots = os.pathsep.join([packages, *paths] if packages else paths)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    text = "".join(f"print({name!r}){START}{PROGRAMS[name]}" for name in programs)
    with TemporaryDirectory() as folder:
        environment |= {"PYTHONPATH": roots, "TRITON_CACHE_DIR": folder}
        words = [sys.executable, "-W", "ignore", "-c", text]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900)
    assert not done.returncode, done.stderr[-4000:]
    found, program = {}, ""
    for line in done.stdout.splitlines():
        if line in programs:
            program = line
        else:
            facts = json.loads(line)
            found[program, facts["name"]] = facts
    return found


LATER = [most for most in LIMITS if most.later]


@pytest.mark.parametrize("most", LATER, ids=lambda most: most.kernel)
def test_the_loop_over_whole_tiles(most: Most) -> None:
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    found = compiled(tuple({limit.program: None for limit in LATER}))
    assert_within(most, found[most.program, most.kernel], version <= (3, 6))


@pytest.fixture(scope="module")
def older_triton(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Install the Triton of many GPU machines into a folder of its own."""
    folder = str(tmp_path_factory.mktemp("older"))
    words = ["install", "--quiet", "--no-deps", "--target", folder, OLDER]
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{OLDER} cannot be installed: {done.stderr.strip()[-200:]}")
    return folder


@pytest.mark.exhaustive
@pytest.mark.parametrize("most", LIMITS, ids=lambda most: f"{most.program}-{most.kernel}")
def test_the_loop_with_an_older_triton(most: Most, older_triton: str) -> None:
    found = compiled(tuple(PROGRAMS), older_triton)
    assert_within(most, found[most.program, most.kernel], older=True)


def assert_within(most: Most, found: dict[str, Any], older: bool) -> None:
    """Assert a kernel's limits; older: those of Triton 3.6."""
    limit = most.instructions if older else most.later
    assert found["instructions"] <= limit, found
    assert found["stack"] <= most.stack and found["local"] <= most.local, found
    assert found["shared"] <= SHARED[90], found
    assert found["waits"] <= found["products"] + 1, found
    assert found["covered"] >= most.covered, found
    # Narrower pieces are products whose columns were split over warpgroups.
    narrowest = min(64, found["block_m"], found["block_n"])
    assert all(columns >= narrowest for _, columns in found["shapes"]), found
