"""Lists of neighbouring rows united, and lists inverted to the rows that read a block, in Triton.

Shapes: ids int32 `[b, h_kv, units, K]`, -1 for none; unit_of int32 `[s]`; lists int32 `[b, h_kv,
chunks, W]`: blocks that any of CHUNK rows reads, increasing; members like lists: bit r is set where
row r of the chunk reads the block; half_lists, half_members int32 `[b, h_kv, 2 chunks, W']`: the
same of the halves of each chunk; sizes int32 `[b, h_kv, chunks, 3]`: blocks in the lists of a
chunk, of its first half and of its second; scratch int32 `[b, h_kv, programs, n]`. Nothing is
written behind a list's blocks.

Inverse of the lists by a counting sort: counts int32 `[b, h_kv, n + 1, segments]`, of the rows of a
segment that read a block; their running sum says where each segment's rows end; readers int32 `[b,
h_kv, s K]`: the rows of block 0, of block 1, ..., each block's increasing.

    counts      segments of rows          after the running sum, rows of a segment are placed from
    block 0  |  3   0   5 |               its last to its first; then ends are starts, and those of
    block 1  |  2   4   1 |               segment 0 are the starts of blocks
    n        |  0   0   0 |

Bits and counts are changed atomically, which depends on no order of these integers.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false

import triton
import triton.language as tl


@triton.jit
def _load_lists(
    ids, unit_of, i_head, o_s, m_s, num_units, num_ids,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the lists of rows o_s: `[ROWS, BLOCK_K]`, -1 for none."""
    o_k = tl.arange(0, BLOCK_K)
    b_unit = i_head * num_units + tl.load(unit_of + o_s, mask=m_s, other=0)
    m_id = m_s[:, None] & (o_k < num_ids)[None, :]
    return tl.load(ids + b_unit[:, None] * num_ids + o_k[None, :], mask=m_id, other=-1)


@triton.jit
def _append(lists, members, p_list, count, o_n, b_member):
    """Append the blocks o_n with any bit to a list of `count` blocks; return the new count."""
    b_any = (b_member != 0).to(tl.int32)
    o_at = p_list + count + tl.cumsum(b_any, 0) - 1
    tl.store(lists + o_at, o_n, mask=b_any != 0)
    tl.store(members + o_at, b_member, mask=b_any != 0)
    return count + tl.sum(b_any)


@triton.jit
def _union_kernel(
    ids, unit_of, scratch, lists, members, half_lists, half_members, sizes,
    seqlen, num_chunks, num_units, num_ids, num_blocks, width, half_width,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fill the lists of every programs-th chunk, one key head; grid (programs, h_kv, b)."""
    HALF: tl.constexpr = CHUNK // 2
    i_head = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    p_bits = scratch + (i_head * tl.num_programs(0) + tl.program_id(0)) * num_blocks
    for i in range(0, num_blocks, BLOCK_N):
        o_n = i + tl.arange(0, BLOCK_N)
        tl.store(p_bits + o_n, tl.zeros([BLOCK_N], tl.int32), mask=o_n < num_blocks)
    o_r = tl.arange(0, CHUNK)
    b_bit = tl.broadcast_to((tl.full([CHUNK], 1, tl.int32) << o_r)[:, None], [CHUNK, BLOCK_K])
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        i_chunk = i_head * num_chunks + chunk
        o_s = chunk * CHUNK + o_r
        b_id = _load_lists(
            ids, unit_of, i_head, o_s, o_s < seqlen, num_units, num_ids, CHUNK, BLOCK_K
        )
        tl.debug_barrier()
        tl.atomic_or(p_bits + tl.maximum(b_id, 0), b_bit, mask=b_id >= 0, sem="relaxed")
        tl.debug_barrier()
        count, first, second = 0, 0, 0
        for i in range(0, num_blocks, BLOCK_N):
            o_n = i + tl.arange(0, BLOCK_N)
            # Past the first cache, which atomic operations do not write.
            m_n = o_n < num_blocks
            b_bits = tl.load(p_bits + o_n, mask=m_n, other=0, cache_modifier=".cg")
            tl.store(p_bits + o_n, tl.zeros([BLOCK_N], tl.int32), mask=m_n)
            count = _append(lists, members, i_chunk * width, count, o_n, b_bits)
            p_half = i_chunk * 2 * half_width
            b_half = b_bits & ((1 << HALF) - 1)
            first = _append(half_lists, half_members, p_half, first, o_n, b_half)
            b_half = (b_bits >> HALF) & ((1 << HALF) - 1)
            second = _append(half_lists, half_members, p_half + half_width, second, o_n, b_half)
        tl.store(sizes + i_chunk * 3, count)
        tl.store(sizes + i_chunk * 3 + 1, first)
        tl.store(sizes + i_chunk * 3 + 2, second)


@triton.jit
def _count_kernel(
    ids, unit_of, counts,
    seqlen, num_units, num_ids, num_blocks, segment,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Count the rows of a segment that read each block; grid (segments, h_kv, b)."""
    i_head = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    segments = tl.num_programs(0)
    p_counts = counts + i_head * (num_blocks + 1) * segments + tl.program_id(0)
    for i in range(0, num_blocks + 1, BLOCK_N):
        o_n = i + tl.arange(0, BLOCK_N)
        p_n = p_counts + o_n.to(tl.int64) * segments
        tl.store(p_n, tl.zeros([BLOCK_N], tl.int32), mask=o_n <= num_blocks)
    tl.debug_barrier()
    start = tl.program_id(0) * segment
    stop = tl.minimum(start + segment, seqlen)
    for i in range(start, stop, ROWS):
        o_s = i + tl.arange(0, ROWS)
        b_id = _load_lists(ids, unit_of, i_head, o_s, o_s < stop, num_units, num_ids, ROWS, BLOCK_K)
        p_id = p_counts + tl.maximum(b_id, 0).to(tl.int64) * segments
        b_one = tl.full([ROWS, BLOCK_K], 1, tl.int32)
        tl.atomic_add(p_id, b_one, mask=b_id >= 0, sem="relaxed")


@triton.jit
def _place_kernel(
    ids, unit_of, ends, readers,
    seqlen, num_units, num_ids, num_blocks, segment,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the rows of a segment to the blocks they read; grid (segments, h_kv, b).

    ends: the running sum of the counts; afterwards where the rows of each segment start. No list
    names a block twice, so all blocks of a row are handled at once.
    """
    i_head = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    segments = tl.num_programs(0)
    p_ends = ends + i_head * (num_blocks + 1) * segments + tl.program_id(0)
    p_readers = readers + i_head * seqlen * num_ids
    start = tl.program_id(0) * segment
    stop = tl.minimum(start + segment, seqlen)
    o_k = tl.arange(0, BLOCK_K)
    for i in range(0, stop - start):
        row = stop - 1 - i
        i_unit = i_head * num_units + tl.load(unit_of + row)
        b_id = tl.load(ids + i_unit * num_ids + o_k, mask=o_k < num_ids, other=-1)
        p_id = p_ends + tl.maximum(b_id, 0).to(tl.int64) * segments
        b_at = tl.load(p_id, mask=b_id >= 0, other=1) - 1
        tl.store(p_readers + b_at, tl.full([BLOCK_K], 0, tl.int32) + row, mask=b_id >= 0)
        tl.store(p_id, b_at, mask=b_id >= 0)
        tl.debug_barrier()
