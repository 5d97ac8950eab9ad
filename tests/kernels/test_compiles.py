"""Every kernel compiles for Ampere and Hopper and fits them, seen without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


ROTARY = """
import torch
from lcdist_kernels.rotary_kernel import rotate, turns
from tests.kernels.compiling import compiled_for

with compiled_for(CAPABILITY) as made:
    for head_dim, dtype in ((128, torch.bfloat16), (80, torch.float32)):
        rotate(torch.zeros(1, 300, 4, head_dim, dtype=dtype), torch.arange(300),
               turns(torch.ones(head_dim // 2)), 1)
assert len(made) == 2
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("program", [FULL, ROTARY], ids=["full", "rotary"])
def test_kernels_compile(program: str, capability: int, tmp_path: Path) -> None:
    roots = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": roots, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program.replace("CAPABILITY", str(capability))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.returncode, done.stderr[-4000:]
