"""Choice of past blocks by kernel: launches over tiles of rows, and the least costs."""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
from torch import Tensor

from lcdist_kernels.landmark.blocks import QueryRows
from lcdist_kernels.landmark.tile_configs import TOP_K
from lcdist_kernels.landmark.top_k import select_least
from lcdist_kernels.landmark.top_k_kernel import (
    INFINITE,
    _least_kernel,
    _top_k_costs_kernel,
)
from lcdist_kernels.landmark.unit_tables import on_device, units_of
from lcdist_kernels.tile_ranges import device_stream
from lcdist_kernels.triton_common import (
    LOG2E,
    Launch,
    check_kernel,
    choose_launch,
    head_constants,
    interpreting,
    last_dim_contiguous,
    launch_context,
    strides,
)

# Costs of units at once: 256 MiB.
COSTS_AT_ONCE = 1 << 26
# Blocks among which a program finds the least costs.
BLOCKS_AT_ONCE = 1 << 14
NUM_WARPS = 8


@torch.no_grad()
def choose_blocks(
    q: Tensor,
    k_landmarks: Tensor,
    rows: QueryRows,
    lengths: Tensor,
    top_k: int,
    softmax_scale: float,
    *,
    launch: Launch | None = None,
) -> Tensor:
    """Return the blocks that each unit reads: int32 `[b, h_kv, units, min(top_k, n)]`.

    Like `top_k.choose_blocks`, but scores and lse are fp32 sums of products in q's dtype. So the
    choice may differ from that one where costs differ by less than about 1e-5; it is exactly that
    of the least of the kernel's own costs. Nothing waits for the device.

    Raises:
        ValueError: as `check_kernel`.
    """
    nheads_kv, num_blocks = k_landmarks.shape[2], k_landmarks.shape[1]
    width, count = min(top_k, num_blocks), len(lengths)
    at_once = max(1, COSTS_AT_ONCE // max(1, q.shape[0] * nheads_kv * num_blocks))
    parts = [
        least_costs(
            unit_costs(q, k_landmarks, rows, lengths, softmax_scale, slice(i, i + at_once), launch),
            width,
        )
        for i in range(0, count, at_once)
    ]
    if len(parts) == 1:
        return parts[0]
    shape = (q.shape[0], nheads_kv, 0, width)
    return torch.cat(parts or [torch.empty(shape, dtype=torch.int32, device=q.device)], 2)


def least_costs(costs: Tensor, width: int) -> Tensor:
    """Return the blocks of least cost, increasing, then -1: int32 `[b, h_kv, units, width]`.

    costs: fp32 `[b, h_kv, units, n]`, positive, contiguous. Like `top_k.select_least`, which is
    used where the costs of a unit do not fit the registers of a program.
    """
    num_blocks, num_rows = costs.shape[3], costs.shape[:3].numel()
    if num_blocks > BLOCKS_AT_ONCE:
        return select_least(costs, width)
    ids = torch.empty((*costs.shape[:3], width), dtype=torch.int32, device=costs.device)
    if not ids.numel():
        return ids
    block_n = max(16, triton.next_power_of_2(num_blocks))
    # Up to 64 costs a thread; a row belongs to one warp if there are at least as many rows.
    block_r = max(1, min(16, NUM_WARPS * 2048 // block_n))
    if interpreting():
        block_r = min(1024, triton.next_power_of_2(num_rows))
    with launch_context(costs):
        _least_kernel[(triton.cdiv(num_rows, block_r),)](
            costs.view(torch.int32), ids, num_rows, num_blocks, width, BLOCK_R=block_r,
            BLOCK_N=block_n, BLOCK_K=triton.next_power_of_2(width), num_warps=NUM_WARPS,
        )  # fmt: skip
    return ids


def unit_costs(
    q: Tensor,
    k_landmarks: Tensor,
    rows: QueryRows,
    lengths: Tensor,
    softmax_scale: float,
    units: slice,
    launch: Launch | None = None,
) -> Tensor:
    """Return the least 1 - ln p over each of some units: fp32 `[b, h_kv, units, n]`.

    It is infinite where a block is past for none of the unit's tokens. Arguments as in
    `choose_blocks`.
    """
    check_kernel(q)
    q, k = last_dim_contiguous(q), last_dim_contiguous(k_landmarks.to(q.dtype))
    table, place = units_of(lengths), device_stream(q)
    first, stop, _ = units.indices(len(lengths))
    first_row, stop_row = table.starts[first], table.starts[stop]
    shape = (q.shape[0], k.shape[2], stop - first, k.shape[1])
    costs = torch.full(shape, INFINITE.value, dtype=torch.int32, device=q.device)
    constants = head_constants(q, k)
    heads = triton.next_power_of_2(constants["GROUP"])
    launch = launch or choose_launch(TOP_K, q)
    launch = launch._replace(block_m=max(launch.block_m, heads))
    if costs.numel() and stop_row > first_row:
        tiles = triton.cdiv(stop_row - first_row, launch.block_m // heads)
        with launch_context(q):
            _top_k_costs_kernel[(tiles, k.shape[2], len(q))](
                q, k, costs, *(on_device(x, place) for x in rows[:2]),
                on_device(table.of_row, place), softmax_scale * LOG2E.value, first_row,
                stop_row, first, stop - first, k.shape[1], *strides(q, k), **constants,
                HEADS=heads, SIZE=rows.block_size, **launch.options(),
            )  # fmt: skip
    return costs.view(torch.float32)
