"""Rotary position embedding in one elementwise kernel; the formulas are in `rotary.py`.

An angle p * inv_freq matters only modulo one turn; in fp32 an angle of 1e6 radians is off by 0.03.
So a frequency is an integer: turns per token in units of 2^-64, which wraps at a full turn. The
product with p, also wrapping, is the angle within its turn, exact to the rounding of the frequency,
p * 2^-54 turns. Its upper 32 bits become an fp32 angle in [-pi, pi), accurate to 2e-7 at any
position. Cosine, sine and rotation are fp32; only the result is cast.

    x `[b, s, h, d]`    program (tile of BLOCK_S tokens, batch row), loop over all heads
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcdist_kernels.common import TensorNotes
from lcdist_kernels.tile_ranges import device_stream, indices_of, on_device
from lcdist_kernels.triton_common import last_dim_contiguous, launch_context, strides

BLOCK_S = 16
_TURNS = TensorNotes()
RADIANS_PER_UNIT = tl.constexpr(2 * math.pi / 2**32)


class Rotation(NamedTuple):
    """Rotation of tokens, as kernels take it.

    Attributes:
        angles: integers `[s]` or `[b, s]` on the device. turns: see `turns`.
        factor: of cosine and sine.
    """

    angles: Tensor
    turns: Tensor
    factor: float

    @property
    def stride(self) -> int:
        """Return the distance from one row of the batch to the next."""
        return self.angles.stride(0) if self.angles.dim() == 2 else 0


def rotation_of(inv_freq: Tensor, factor: float, positions: Tensor, x: Tensor) -> Rotation:
    """Return the rotation by integer positions `[s]` or `[b, s]`, on the device of x."""
    if positions.device != x.device:
        numbers = on_device(indices_of(positions), device_stream(x))
        positions = numbers.view(positions.shape)
    steps = _TURNS.find(inv_freq, x.device, lambda: turns(inv_freq).to(x.device))
    return Rotation(positions.contiguous(), steps, float(factor))


def turns(inv_freq: Tensor) -> Tensor:
    """Convert frequencies in radians per token to 2^-64 turns per token, modulo one: int64."""
    cycles = inv_freq.double() / (2 * math.pi)
    return ((cycles - cycles.round()) * 2.0**64).to(torch.int64)


@triton.jit
def cosines(b_p, b_step):
    """Return (cosine, sine) of positions `[rows]` times steps `[pairs]`: fp32 `[rows, pairs]`."""
    b_place = (b_p.to(tl.int64)[:, None] * b_step[None, :]) >> 32
    b_angle = b_place.to(tl.float32) * RADIANS_PER_UNIT
    return tl.cos(b_angle), tl.sin(b_angle)


@triton.jit
def token_program(seqlen, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return a program's row of the batch, its tokens and features, and which of them exist."""
    i_b = tl.program_id(1).to(tl.int64)
    o_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    o_f = tl.arange(0, BLOCK_H)
    return i_b, o_s, o_f, o_s < seqlen, o_f < HALF


@triton.jit
def _rotate_kernel(
    x, y,
    positions,
    steps,
    factor, sign, seqlen, nheads,
    stride_xb, stride_xs, stride_xh, stride_yb, stride_ys, stride_yh, stride_pb,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Rotate a tile of tokens, all heads; sign = -1 gives the adjoint."""
    i_b, o_s, o_f, m_s, m_f = token_program(seqlen, HALF, BLOCK_H, BLOCK_S)
    m = m_s[:, None] & m_f[None, :]
    b_p = tl.load(positions + i_b * stride_pb + o_s, mask=m_s, other=0)
    b_cos, b_sin = cosines(b_p, tl.load(steps + o_f, mask=m_f, other=0))
    b_cos, b_sin = b_cos * factor, b_sin * (factor * sign)
    o_x = i_b * stride_xb + (o_s.to(tl.int64) * stride_xs)[:, None] + o_f[None, :]
    o_y = i_b * stride_yb + (o_s.to(tl.int64) * stride_ys)[:, None] + o_f[None, :]
    for _ in range(0, nheads):
        b_one = tl.load(x + o_x, mask=m, other=0.0).to(tl.float32)
        b_two = tl.load(x + o_x + HALF, mask=m, other=0.0).to(tl.float32)
        b_y = b_one * b_cos - b_two * b_sin
        tl.store(y + o_y, b_y.to(y.dtype.element_ty), mask=m)
        b_y = b_two * b_cos + b_one * b_sin
        tl.store(y + o_y + HALF, b_y.to(y.dtype.element_ty), mask=m)
        o_x += stride_xh
        o_y += stride_yh


def rotate(x: Tensor, positions: Tensor, steps: Tensor, factor: float, sign: float = 1.0) -> Tensor:
    """Rotate x `[b, s, h, d]` by `positions`, integers `[s]` or `[b, s]`; differentiable.

    steps: `turns` of the frequencies, on x's device. factor: of cosine and sine. sign: -1 rotates
    back. x in bf16, fp16 or fp32, any strides. Only positions are saved for the backward.
    """
    if positions.device.type == "cpu":
        flat = on_device(indices_of(positions), device_stream(x))
        positions = flat.view(positions.shape)
    return _Rotate.apply(x, positions.contiguous(), steps, float(factor), sign)


class _Rotate(torch.autograd.Function):
    """Rotation whose adjoint is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, steps: Tensor, factor: float, sign: float):
        ctx.save_for_backward(positions, steps)
        ctx.factor, ctx.sign = factor, sign
        x = last_dim_contiguous(x)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        batch, seqlen, nheads, head_dim = x.shape
        if not x.numel():
            return y
        with launch_context(x):
            _rotate_kernel[(triton.cdiv(seqlen, BLOCK_S), batch)](
                x, y, positions, steps, factor, sign, seqlen, nheads, *strides(x, y),
                positions.stride(0) if positions.dim() == 2 else 0, HALF=head_dim // 2,
                BLOCK_H=triton.next_power_of_2(head_dim // 2), BLOCK_S=BLOCK_S,
            )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        positions, steps = ctx.saved_tensors
        dx = _Rotate.apply(dy, positions, steps, ctx.factor, -ctx.sign)
        return dx, None, None, None, None
