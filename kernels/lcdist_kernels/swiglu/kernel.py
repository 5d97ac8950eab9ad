"""SwiGLU as kernels that read once and write once; formulas in `op.py`.

    gate_up `[rows, 2 n]`    program (row, tile of BLOCK columns of gate and the same of up)

Values are fp32 inside; only results are rounded.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from lcdist_kernels.triton_common import launch_context

# Sixteen elements of each tensor a thread: two loads of 16 bytes in bf16.
MOST_COLUMNS, NUM_WARPS = 2048, 4


@triton.jit
def _load_halves(gate_up, o_row, o_n, m, width):
    """Return tiles of gate and up of a row, in fp32."""
    b_gate = tl.load(gate_up + o_row + o_n, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(gate_up + o_row + width + o_n, mask=m, other=0.0).to(tl.float32)
    return b_gate, b_up


@triton.jit
def _swiglu_fwd_kernel(gate_up, z, width, stride, BLOCK: tl.constexpr):
    """Compute a tile of z; `stride` is the distance between rows of gate_up."""
    i_row = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o_n < width
    b_gate, b_up = _load_halves(gate_up, i_row * stride, o_n, m, width)
    b_z = b_gate / (1.0 + tl.exp(-b_gate)) * b_up
    tl.store(z + i_row * width + o_n, b_z.to(z.dtype.element_ty), mask=m)


@triton.jit
def _swiglu_bwd_kernel(
    gate_up, dz, width, stride, stride_dz, AGAIN: tl.constexpr, BLOCK: tl.constexpr
):
    """Overwrite tiles that this program alone reads: gate and up with gradients, dz with z."""
    i_row = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o_n < width
    o_row = i_row * stride
    b_gate, b_up = _load_halves(gate_up, o_row, o_n, m, width)
    b_dz = tl.load(dz + i_row * stride_dz + o_n, mask=m, other=0.0).to(tl.float32)
    b_sigmoid = 1.0 / (1.0 + tl.exp(-b_gate))
    b_dgate = b_dz * b_up * b_sigmoid * (1.0 + b_gate * (1.0 - b_sigmoid))
    b_dup = b_dz * b_gate * b_sigmoid
    if AGAIN:
        b_z = b_gate / (1.0 + tl.exp(-b_gate)) * b_up
        tl.store(dz + i_row * stride_dz + o_n, b_z.to(dz.dtype.element_ty), mask=m)
    tl.store(gate_up + o_row + o_n, b_dgate.to(gate_up.dtype.element_ty), mask=m)
    tl.store(gate_up + o_row + width + o_n, b_dup.to(gate_up.dtype.element_ty), mask=m)


def fwd(gate_up: Tensor) -> Tensor:
    """Return z `[rows, n]` of gate_up `[rows, 2 n]`, whose rows are contiguous."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    z = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if z.numel():
        block, grid = _tiles(rows, width)
        with launch_context(z):
            _swiglu_fwd_kernel[grid](
                gate_up, z, width, gate_up.stride(0), BLOCK=block, num_warps=NUM_WARPS
            )
    return z


def bwd_(gate_up: Tensor, dz: Tensor, again: bool = False) -> Tensor | None:
    """Overwrite gate_up `[rows, 2 n]` with its gradient, given that of z.

    again: also overwrite dz with z, in the same pass, and return it; otherwise return None.
    """
    rows, width = dz.shape
    if dz.numel():
        block, grid = _tiles(rows, width)
        with launch_context(dz):
            _swiglu_bwd_kernel[grid](
                gate_up, dz, width, gate_up.stride(0), dz.stride(0), AGAIN=again, BLOCK=block,
                num_warps=NUM_WARPS,
            )  # fmt: skip
        # Autograd does not see what a kernel writes.
        increment_version([gate_up, dz] if again else gate_up)
    return dz if again else None


def _tiles(rows: int, width: int) -> tuple[int, tuple[int, int]]:
    """Return the columns of a tile and the grid."""
    block = min(MOST_COLUMNS, triton.next_power_of_2(width))
    return block, (rows, triton.cdiv(width, block))
