"""LSSA and LSSAR as a differentiable torch function; see `common.check_impl`."""

from typing import Any

import torch
from torch import Tensor

from lcdist_kernels.common import check_impl, check_self, document_borders
from lcdist_kernels.lssar.directions_kernel import (
    Directions,
    DirectionTables,
    directions_bwd,
    directions_of,
)
from lcdist_kernels.lssar.impl import TRITON_IMPL, LssarImpl, select_lssar_impl
from lcdist_kernels.lssar.reference import SHARPENED, lssar_reference
from lcdist_kernels.lssar.rows import (
    Band,
    Reweight,
    RowResults,
    directions,
    kernel_logit_scales,
    logit_scales,
)
from lcdist_kernels.rotary import Rotary, document_positions, token_numbers
from lcdist_kernels.tape import kept, records

IMPLS = ("auto", "triton", "torch", "reference")


def lssar_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    reweight: Reweight | None = SHARPENED, rotary: Rotary | None = None,
    positions: Tensor | None = None, cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Return attention of q `[b, s, h, d]` over k, v `[b, s, h_kv, d]`, shaped like q.

    Args:
        impl: one of `IMPLS`.
        other: as in `lssar_reference`.

    Raises:
        ValueError: as `lssar_reference`; also an unknown `impl`, tensors that kernels do not take,
            and a power below 1 in half precision.
    """
    check_impl(impl, "lssar", IMPLS)
    if impl == "reference":
        return lssar_reference(
            q, k, v, reweight=reweight, rotary=rotary, positions=positions, cu_seqlens=cu_seqlens,
            softmax_scale=softmax_scale,
        )  # fmt: skip
    check_self(q, k, v)
    implementation = select_lssar_impl(impl, q, "lssar attention", reweight)
    documents = document_borders(cu_seqlens, q.shape[1])
    index, starts = token_numbers(q.shape[1], documents)
    positions = document_positions(q, documents) if positions is None else positions
    band = Band(index, starts, index)
    if implementation is TRITON_IMPL:
        tables = direction_tables(q, band.counts, softmax_scale, rotary, positions)
        return LssarKernelsFunction.apply(q, k, v, band, reweight, tables)
    queries, keys = directions(q, rotary, positions), directions(k, rotary, positions)
    queries = queries * logit_scales(band.counts, softmax_scale, queries)
    return LssarFunction.apply(queries, keys, v, band, reweight, implementation)


def direction_tables(
    q: Tensor, counts: Tensor, softmax_scale: float | None, rotary: Rotary | None, positions: Tensor
) -> DirectionTables:
    """Return what the directions of q `[b, s, h, d]`, and of keys of its tokens, are made with.

    counts, softmax_scale: as in `logit_scales`. positions: integers `[s]` or `[b, s]`.
    """
    scales = kernel_logit_scales(counts, softmax_scale, q)
    return DirectionTables(scales, None if rotary is None else rotary.rotation(positions, q))


class LssarFunction(torch.autograd.Function):
    """Self-attention over one block of directions; saves them, v, out, e and two row scalars."""

    @staticmethod
    def forward(
        ctx: Any, q, k, v, band: Band, reweight: Reweight | None, impl: LssarImpl
    ) -> Tensor:
        with_slope = records() or any(ctx.needs_input_grad)

        def attend() -> RowResults:
            results = impl.whole(q, k, v, band, reweight, slope=with_slope)
            return results.narrowed(v.dtype)

        results = RowResults(*kept(attend))
        ctx.save_for_backward(q, k, v, *results)
        ctx.band, ctx.reweight, ctx.impl = band, reweight, impl
        return results.out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *row = ctx.saved_tensors
        band, reweight, impl = ctx.band, ctx.reweight, ctx.impl
        stats = impl.rows(dout, *row, band, reweight)
        dq, dk, dv = impl.bwd(dout, q, k, v, band, stats, reweight)
        return dq, dk, dv.to(v.dtype), None, None, None


class LssarKernelsFunction(torch.autograd.Function):
    """The same of q and k that are not directions yet, all in kernels.

    Saves one fp32 scalar more of each row and key: the factor that makes it a direction.
    """

    @staticmethod
    def forward(
        ctx: Any, q, k, v, band: Band, reweight: Reweight | None, tables: DirectionTables
    ) -> Tensor:
        made = directions_of(q, k, tables)
        slope = records() or any(ctx.needs_input_grad)
        results = RowResults(
            *kept(lambda: TRITON_IMPL.whole(*made[:2], v, band, reweight, slope=slope))
        )
        ctx.save_for_backward(*made, v, *results)
        ctx.band, ctx.reweight, ctx.tables = band, reweight, tables
        return results.out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        *saved, v, out, e, mean, gamma = ctx.saved_tensors
        made = Directions(*saved)
        band, reweight = ctx.band, ctx.reweight
        stats = TRITON_IMPL.rows(dout, out, e, mean, gamma, band, reweight)
        dqueries, dkeys, dv = TRITON_IMPL.bwd(
            dout, *made[:2], v, band, stats, reweight, values_dtype=v.dtype
        )
        dq, dk = directions_bwd(dqueries, dkeys, made, ctx.tables)
        return dq, dk, dv, None, None, None
