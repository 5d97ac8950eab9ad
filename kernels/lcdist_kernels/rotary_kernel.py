"""Rotary position embedding in one elementwise kernel; the maths is in `rotary.py`.

An angle p * inv_freq is needed only modulo a turn, and fp32 would carry one of 1e6 radians to 0.03.
So frequencies are kept as turns a token in units of 2^-64 turn, an integer that wraps where a turn
is full: p times it, wrapping, is the angle's place in its turn, exact to p * 2^-54 turns as the
frequency itself is rounded. Its upper 32 bits become an fp32 angle in [-pi, pi), within 2e-7
whatever the position; cosine, sine and the rotation are fp32, and only the result is cast.
"""
# What a kernel's arguments are, `tl.constexpr` decides, which is no type to Python's checkers.
# pyright: reportArgumentType=false, reportCallIssue=false

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcdist_kernels.tile_ranges import Indices, on_device, place_of
from lcdist_kernels.triton_common import last_dim_contiguous, launch_context

BLOCK_S = 16
RADIANS_PER_UNIT = tl.constexpr(2 * math.pi / 2**32)


def turns(inv_freq: Tensor) -> Tensor:
    """Frequencies in radians a token as 2^-64 turns a token, modulo one: int64, of that shape."""
    cycles = inv_freq.double() / (2 * math.pi)
    return ((cycles - cycles.round()) * 2.0**64).to(torch.int64)


@triton.jit
def _rotate_kernel(
    x, y,
    positions,
    steps,
    factor, sign, seqlen, nheads,
    stride_xb, stride_xs, stride_xh, stride_yb, stride_ys, stride_yh, stride_pb,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(1).to(tl.int64)
    o_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    o_f = tl.arange(0, BLOCK_H)
    m_s, m_f = o_s < seqlen, o_f < HALF
    m = m_s[:, None] & m_f[None, :]
    b_p = tl.load(positions + i_b * stride_pb + o_s, mask=m_s, other=0).to(tl.int64)
    b_step = tl.load(steps + o_f, mask=m_f, other=0)
    b_place = (b_p[:, None] * b_step[None, :]) >> 32
    b_angle = b_place.to(tl.float32) * RADIANS_PER_UNIT
    b_cos = tl.cos(b_angle) * factor
    b_sin = tl.sin(b_angle) * (factor * sign)
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


def rotate(x: Tensor, positions: Tensor, steps: Tensor, factor: float) -> Tensor:
    """x `[b, s, h, d]` rotated by `positions`, integers `[s]` or `[b, s]`; differentiable.

    steps: `turns` of the frequencies, on x's device; factor: of cosine and sine. x in bf16, fp16 or
    fp32, any strides; nothing but positions is kept for the backward.
    """
    if positions.device.type == "cpu":
        flat = on_device(Indices(positions.flatten()), place_of(x))
        positions = flat.view(positions.shape)
    return _Rotate.apply(x, positions.contiguous(), steps, float(factor), 1.0)


class _Rotate(torch.autograd.Function):
    """The adjoint is the rotation by the opposite angle."""

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
                x, y, positions, steps, factor, sign, seqlen, nheads, *x.stride()[:3],
                *y.stride()[:3], positions.stride(0) if positions.dim() == 2 else 0,
                HALF=head_dim // 2, BLOCK_H=triton.next_power_of_2(head_dim // 2), BLOCK_S=BLOCK_S,
            )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        positions, steps = ctx.saved_tensors
        dx = _Rotate.apply(dy, positions, steps, ctx.factor, -ctx.sign)
        return dx, None, None, None, None
