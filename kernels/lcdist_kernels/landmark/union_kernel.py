"""Union of the lists of neighbouring rows in Triton: blocks that any of CHUNK rows reads.

Shapes: ids int32 `[b, h_kv, units, K]`, -1 for none; unit_of int32 `[s]`; members int32 `[b, h_kv,
chunks, n]`: bit r is set where row r of the chunk reads the block; lists like members: blocks with
any bit, increasing, then -1; readers int32 `[b, h_kv, n, chunks]`: the inverse of the lists.

Bits are set atomically, which depends on no order.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false

import triton
import triton.language as tl


@triton.jit
def _union_kernel(
    ids, unit_of, members, lists,
    seqlen, num_units, num_ids, num_blocks,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fill members and lists of one chunk of rows and one key head; grid (chunks, h_kv, b)."""
    i_head = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    i_row = (i_head * tl.num_programs(0) + tl.program_id(0)) * num_blocks
    p_members, p_list = members + i_row, lists + i_row
    for i in range(0, num_blocks, BLOCK_N):
        o_n = i + tl.arange(0, BLOCK_N)
        tl.store(p_members + o_n, tl.zeros([BLOCK_N], tl.int32), mask=o_n < num_blocks)
        tl.store(p_list + o_n, tl.full([BLOCK_N], -1, tl.int32), mask=o_n < num_blocks)
    tl.debug_barrier()
    o_r = tl.arange(0, CHUNK)
    o_s = tl.program_id(0) * CHUNK + o_r
    o_k = tl.arange(0, BLOCK_K)
    m_id = (o_s < seqlen)[:, None] & (o_k < num_ids)[None, :]
    b_unit = i_head * num_units + tl.load(unit_of + o_s, mask=o_s < seqlen, other=0)
    b_id = tl.load(ids + b_unit[:, None] * num_ids + o_k[None, :], mask=m_id, other=-1)
    b_bit = tl.broadcast_to((tl.full([CHUNK], 1, tl.int32) << o_r)[:, None], [CHUNK, BLOCK_K])
    tl.atomic_or(p_members + tl.maximum(b_id, 0), b_bit, mask=b_id >= 0, sem="relaxed")
    tl.debug_barrier()
    count = 0
    for i in range(0, num_blocks, BLOCK_N):
        o_n = i + tl.arange(0, BLOCK_N)
        # Past the first cache, which atomic operations do not write.
        b_member = tl.load(p_members + o_n, mask=o_n < num_blocks, other=0, cache_modifier=".cg")
        b_any = (b_member != 0).to(tl.int32)
        tl.store(p_list + count + tl.cumsum(b_any, 0) - 1, o_n, mask=b_any != 0)
        count += tl.sum(b_any)


@triton.jit
def _invert_kernel(
    members, readers,
    num_chunks, num_blocks,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Fill the readers of one block and one key head; grid (n, h_kv, b)."""
    i_head = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    p_members = members + i_head * num_chunks * num_blocks + tl.program_id(0)
    p_readers = readers + (i_head * num_blocks + tl.program_id(0)) * num_chunks
    count = 0
    for i in range(0, num_chunks, BLOCK_M):
        o_m = i + tl.arange(0, BLOCK_M)
        o_at = o_m.to(tl.int64) * num_blocks
        b_any = (tl.load(p_members + o_at, mask=o_m < num_chunks, other=0) != 0).to(tl.int32)
        tl.store(p_readers + count + tl.cumsum(b_any, 0) - 1, o_m, mask=b_any != 0)
        count += tl.sum(b_any)
    for i in range(0, num_chunks, BLOCK_M):
        o_m = i + tl.arange(0, BLOCK_M)
        m_none = (o_m >= count) & (o_m < num_chunks)
        tl.store(p_readers + o_m, tl.full([BLOCK_M], -1, tl.int32), mask=m_none)
