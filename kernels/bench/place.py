"""Set up the process for kernel benchmarks; import this module before any kernel.

A bare GPU machine has torch, triton, numpy and pytest, and lcdist is not installed there. Without a
GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported. So
nothing that stands above `from place import` may import Triton.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICE = "cuda" if HAS_GPU else "cpu"


def find_cache(home: Path) -> None:
    """Give Triton's compiler another cache folder if the home folder is not writable."""
    if "TRITON_CACHE_DIR" in os.environ:
        return
    usual = home / ".triton"
    try:
        usual.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=usual):
            return
    except OSError:
        other = Path(tempfile.gettempdir()) / f"lcdist-triton-{os.getuid()}"
        os.environ["TRITON_CACHE_DIR"] = str(other)


# Child processes inherit it.
if HAS_GPU:
    find_cache(Path.home())


def device_name() -> str:
    """Return the GPU's name, or a note that nothing here was measured on a GPU."""
    return torch.cuda.get_device_name() if HAS_GPU else "no GPU: a trial of the lines on a CPU"


def lost_cuda() -> bool:
    """Return whether an invalid memory access has ended CUDA for this process."""
    if HAS_GPU:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
    return False
