"""Launch the decode kernels: splits chosen by the rows' lengths, tables kept on the device."""
# Python's type checkers do not know the options of a launch.
# pyright: reportCallIssue=false

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from lcdist_kernels.common import positive_scale
from lcdist_kernels.decode.kernel import _blocks_kernel, _merge_kernel, _split_kernel
from lcdist_kernels.plans import cached_plan
from lcdist_kernels.tile_ranges import DeviceStream, device_stream, send
from lcdist_kernels.triton_common import (
    LOG2E,
    check_kernel,
    dim_constants,
    last_dim_contiguous,
    launch_context,
    padded,
)

# Programs that fill a GPU of 132 multiprocessors twice.
PROGRAMS = 264
MOST_SPLITS = 128
# Entries of a tile, by bytes of an element; twice as many for a head_dim of up to 64.
ENTRIES = {2: 64, 4: 32}
LEAST_ROWS = 16

Span = tuple[int, int, int]


def decode_fwd(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    spans: Sequence[Span],
    softmax_scale: float,
    step: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the partials of single queries over rows of a cache.

    Args:
        q: `[r, h, d]`, rotated.
        k: `[rows, capacity, h_k, d]`, rotated.
        u: values, `[rows, capacity, h_u, d]`; h_u is a multiple of h_k and divides h.
        spans: for each query the row of the cache, its first entry and how many it reads.
        softmax_scale: factor of a score.
        step: distance between the entries that a query reads.

    Returns:
        out fp32 `[r, h, d]` and lse fp32 `[r, h]`. A query that reads nothing has 0 and -inf.

    Raises:
        ValueError: kernels do not take such tensors.
    """
    check_kernel(q[:, None])
    q, softmax_scale = positive_scale(q, softmax_scale)
    q, k, u = q.contiguous(), last_dim_contiguous(k), last_dim_contiguous(u)
    (rows, nheads, head_dim), nheads_u = q.shape, u.shape[2]
    tile = _entries(q)
    longest = max(count for _, _, count in spans)
    splits, per_split = _splits(longest, tile, rows * nheads_u)
    part_out, part_lse = _parts(q, splits)
    table = _span_table(tuple(spans), device_stream(q))
    strides = [stride for x in (k, u) for stride in x.stride()[:3]]
    with launch_context(q):
        _split_kernel[(splits, nheads_u, rows)](
            q, k, u, table, part_out, part_lse,
            softmax_scale * LOG2E.value, step, per_split, nheads, nheads_u // k.shape[2],
            *strides,
            **_group(nheads // nheads_u), BLOCK_N=tile, HEAD_DIM=head_dim, BLOCK_D=padded(head_dim),
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return _merged(part_out, part_lse)


def decode_blocks(
    q: Tensor, table: Tensor, ids: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Return the partials of single queries over listed blocks with landmarks.

    Args:
        q: `[r, h, d]`, rotated.
        table: `[m, 2, block size, d]`: blocks of rotated keys and values, each of one key head.
        ids: entries of the table, int32 `[r, h_kv, K]`; -1: none.
        softmax_scale: factor of a score.

    Returns:
        out fp32 `[r, h, d]` and lse fp32 `[r, h]`. A query that reads nothing has 0 and -inf.

    Raises:
        ValueError: kernels do not take such tensors.
    """
    check_kernel(q[:, None])
    q, softmax_scale = positive_scale(q, softmax_scale)
    q, table, ids = q.contiguous(), table.contiguous(), ids.contiguous()
    (rows, nheads, head_dim), (_, nheads_kv, num_ids) = q.shape, ids.shape
    size = table.shape[2]
    splits, per_split = _splits(num_ids, 1, rows * nheads_kv)
    part_out, part_lse = _parts(q, splits)
    with launch_context(q):
        _blocks_kernel[(splits, nheads_kv, rows)](
            q, table, ids, part_out, part_lse,
            softmax_scale * LOG2E.value, per_split, nheads, num_ids,
            SIZE=size, **_group(nheads // nheads_kv),
            BLOCK_N=min(_entries(q), max(LEAST_ROWS, triton.next_power_of_2(size))),
            HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), num_warps=4, num_stages=2,
        )  # fmt: skip
    return _merged(part_out, part_lse)


def _entries(q: Tensor) -> int:
    """Return the entries of a tile for q `[r, h, d]`."""
    return ENTRIES[q.element_size()] * (2 if padded(q.shape[2]) <= 64 else 1)


def _splits(count: int, tile: int, programs: int) -> tuple[int, int]:
    """Return how many parts `count` entries are split into, and the entries of a part.

    programs: those of one split. Parts are whole tiles, and the number does not follow every token.
    """
    tiles = max(1, triton.cdiv(count, tile))
    wanted = max(1, min(MOST_SPLITS, PROGRAMS // programs, tiles))
    per_split = triton.cdiv(tiles, wanted)
    return triton.cdiv(tiles, per_split), per_split * tile


def _group(size: int) -> dict[str, int]:
    """Return the constants of the queries that share a value head."""
    return {"GROUP": size, "BLOCK_G": max(LEAST_ROWS, triton.next_power_of_2(size))}


def _parts(q: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    rows, nheads, head_dim = q.shape
    options = {"dtype": torch.float32, "device": q.device}
    return (
        torch.empty(rows, splits, nheads, head_dim, **options),
        torch.empty(rows, splits, nheads, **options),
    )


def _merged(part_out: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    rows, splits, nheads, head_dim = part_out.shape
    if splits == 1:
        return part_out[:, 0], part_lse[:, 0]
    out, lse = part_out.new_empty(rows, nheads, head_dim), part_lse.new_empty(rows, nheads)
    with launch_context(part_out):
        _merge_kernel[(nheads, rows)](
            part_out, part_lse, out, lse, splits,
            BLOCK_S=triton.next_power_of_2(splits), **dim_constants(part_out), num_warps=4,
        )  # fmt: skip
    return out, lse


@cached_plan
def _span_table(spans: tuple[Span, ...], place: DeviceStream) -> Tensor:
    """Return the spans on the device; the layers of a step share them."""
    return send(torch.tensor(spans, dtype=torch.int32), place)
