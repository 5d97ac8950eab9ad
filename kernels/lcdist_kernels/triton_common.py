"""Helpers of every Triton kernel: supported tensors, launches, loads and stores of tiles.

Inside kernels: `dot`, `reciprocal`, `load_tile`, `load_rows`, `load_box`, `store_tile`,
`store_rows`, with int64 offsets.
Around launches: `interpreting`, `unsupported_reason`, `check_kernel`, `launch_context`,
`last_dim_contiguous`, `Launch`, `launch_table`, `choose_launch`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from lcdist_kernels.common import check_qkv, log_choice, positive_scale

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below every score and finite: -inf - LOWEST is -inf, so an empty row needs no branch.
LOWEST = tl.constexpr(-3.0e38)
# Takes the place of a scale of 0: weights are exp2(0) = 1 too, and -inf times it is a number.
LEAST_SCALE = tl.constexpr(1.0e-30)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (16, 256)

_INTERPRETER_LOCK = Lock()


@cache
def interpreting() -> bool:
    """Return whether kernels run as Python on any device (TRITON_INTERPRET=1 at import)."""
    return bool(knobs.runtime.interpret)


# Fixed when kernels are decorated: a later change of the environment has no effect.
INTERPRETED = tl.constexpr(interpreting())


class Launch(NamedTuple):
    """Tile sizes, warps and pipeline stages of a launch, chosen by hand.

    No autotuning: the tables of a band are cut into tiles before the launch, and another number of
    warps sums in another order, so a tuned choice would change bits from run to run.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """Return the keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


LaunchTable = dict[tuple[int, int], Launch]
"""(greatest padded head_dim, bytes an element: 2 or 4) -> Launch."""

Tiles = tuple[int, int, int, int]


def launch_table(half: Sequence[Tiles], single: Sequence[Tiles]) -> LaunchTable:
    """Return the table of a kernel's launches.

    Args:
        half: fields of `Launch` for fp16 and bf16, at a head_dim of up to 64, 128 and 256.
        single: the same for fp32.
    """
    return {
        (head_dim, size): Launch(*tiles)
        for size, row in ((2, half), (4, single))
        for head_dim, tiles in zip((64, 128, 256), row, strict=True)
    }


INTERPRETED_LAUNCH = Launch(64, 64, 4, 1)


def choose_launch(table: LaunchTable, x: Tensor, hopper: LaunchTable | None = None) -> Launch:
    """Return the entry of `table` for x `[b, s, h, d]`, or a fixed one for the interpreter.

    hopper: entries that replace those of `table` from compute capability 9 on, where a product has
    at least 16 rows a warp (`tests/kernels/test_tile_configs.py` says why).
    """
    if interpreting():
        return INTERPRETED_LAUNCH
    if hopper and is_hopper(x):
        table = table | hopper
    return table[choose_key(table, x)]


def choose_key(table: LaunchTable, x: Tensor) -> tuple[int, int]:
    """Return the key of the entry of `table` for x `[b, s, h, d]`."""
    size, width = x.element_size(), padded(x.shape[3])
    return min(key for key in table if key[0] >= width and key[1] == size)


def is_hopper(x: Tensor) -> bool:
    """Return whether kernels for x run on a GPU of compute capability 9 or later."""
    return not interpreting() and torch.cuda.get_device_capability(x.device)[0] >= 9


def padded(head_dim: int) -> int:
    """Return BLOCK_D: head_dim rounded up to a power of two, at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


def unsupported_reason(x: Tensor) -> str | None:
    """Return why kernels do not take tensors like x `[b, s, h, d]`, or None if they do."""
    least, most = HEAD_DIMS
    reason = unsupported_tensor_reason(x)
    if reason is None and (x.shape[3] % 2 or not least <= x.shape[3] <= most):
        return f"kernels take an even head_dim from {least} to {most}, not {x.shape[3]}"
    return reason


def unsupported_tensor_reason(x: Tensor) -> str | None:
    """Return why kernels do not take tensors of the device or dtype of x, or None if they do."""
    if x.device.type != "cuda" and not interpreting():
        return f"kernels run on CUDA, the tensors are on {x.device}"
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] < 8:
        return "kernels run on GPUs of compute capability 8.0 and above"
    if x.dtype not in DTYPES:
        return f"kernels take bf16, fp16 and fp32, the tensors are {x.dtype}"
    return None


def check_kernel(x: Tensor) -> None:
    """Raise ValueError with the reason if kernels do not take tensors like x."""
    reason = unsupported_reason(x)
    if reason is not None:
        raise ValueError(
            f"impl = 'triton': {reason}; use impl = 'auto' or 'torch'"
            + ("" if interpreting() else ", or set TRITON_INTERPRET=1 to run kernels on a CPU")
        )


def use_kernels(impl: str, x: Tensor, what: str) -> bool:
    """Return whether `impl`, "auto", "triton" or "torch", means kernels for x `[b, s, h, d]`.

    "auto" takes kernels on CUDA only: interpreted ones are for tests, many times slower than torch.
    The choice of "auto" is logged; what: the operator's name in the log. Raises ValueError for
    "triton" where kernels do not take such tensors.
    """
    if impl == "triton":
        check_kernel(x)
    if impl != "auto":
        return impl == "triton"
    on_cpu = f"kernels run on CUDA, the tensors are on {x.device}"
    reason = unsupported_reason(x) if x.is_cuda else on_cpu
    if reason is None:
        log_choice(f"{what}: Triton kernels, as the tensors are {x.dtype} on CUDA")
    else:
        log_choice(f"{what}: tiled torch, as {reason}")
    return reason is None


def take_inputs(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return q, k, v as a forward kernel takes them, with a scale of at least 0.

    Raises:
        ValueError: as `check_qkv` and `check_kernel`.
    """
    check_qkv(q, k, v)
    check_kernel(q)
    q, softmax_scale = positive_scale(q, softmax_scale)
    return last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v), softmax_scale


def last_dim_contiguous(x: Tensor) -> Tensor:
    """Return x with its last dimension contiguous, as kernels need; copy only if it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Return the batch, sequence and head strides of each tensor `[b, s, h, d]`, in order."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def head_constants(q: Tensor, k: Tensor) -> dict[str, int]:
    """Return the kernel constants of the heads of q `[b, s, h, d]` and k `[b, s, h_kv, d]`."""
    return {"GROUP": q.shape[2] // k.shape[2], **dim_constants(q)}


def dim_constants(q: Tensor) -> dict[str, int]:
    """Return the kernel constants of the head_dim of q `[b, s, h, d]`."""
    return {"HEAD_DIM": q.shape[3], "BLOCK_D": padded(q.shape[3])}


@contextmanager
def launch_context(x: Tensor) -> Iterator[None]:
    """Select x's device for launches; the interpreter serves one thread at a time."""
    if interpreting():
        with _INTERPRETER_LOCK:
            yield
    else:
        with torch.cuda.device(x.device):
            yield


@triton.jit
def dot(a, b, acc):
    """Return acc + a @ b, summed in fp32; fp32 operands are not rounded to TF32."""
    if INTERPRETED:
        # The interpreter multiplies bf16 as integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def reciprocal(b_x):
    """Return 1 / x for numbers of at least 1 and far from overflow, right to 1 ulp.

    A division takes six instructions for all other numbers, this one.
    """
    if INTERPRETED:
        b_x = 1.0 / b_x
    else:
        b_x = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [b_x], dtype=tl.float32, is_pure=True, pack=1
        )
    return b_x


@triton.jit
def features(HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return (feature, whether there is one) of each column of a tile, `[BLOCK_D]`.

    Padding follows each half of the features, so that feature i and i + HEAD_DIM / 2, the pairs of
    a rotation, are BLOCK_D / 2 columns apart.
    """
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    if HEAD_DIM < BLOCK_D:
        o_half = o_d % (BLOCK_D // 2)
        m_d = o_half < HEAD_DIM // 2
        o_d = o_half + (o_d // (BLOCK_D // 2)) * (HEAD_DIM // 2)
    return o_d, m_d


@triton.jit
def load_tile(
    p, start, seqlen, stride_s,
    BLOCK_S: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Return rows [start, start + BLOCK_S) of one head, `[BLOCK_S, BLOCK_D]`; 0 outside the tensor.

    p: the head's first element. start: a multiple of BLOCK_S. WHOLE: all rows are below seqlen.
    """
    o_s = tl.arange(0, BLOCK_S)
    o_d, m_d = features(HEAD_DIM, BLOCK_D)
    # In a loop only the scalar `start` changes; the tile's own offsets are loop invariant.
    p_tile = p + start.to(tl.int64) * stride_s + (o_s.to(tl.int64) * stride_s)[:, None] + o_d
    if WHOLE:
        if HEAD_DIM == BLOCK_D:
            b = tl.load(p_tile)
        else:
            b = tl.load(p_tile, mask=m_d[None, :], other=0.0)
    else:
        m = (start + o_s < seqlen)[:, None]
        if HEAD_DIM == BLOCK_D:
            b = tl.load(p_tile, mask=m, other=0.0)
        else:
            b = tl.load(p_tile, mask=m & m_d[None, :], other=0.0)
    return b


@triton.jit
def load_box(x, at, start, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return rows [start, start + BLOCK_S) of one head, `[BLOCK_S, BLOCK_D]`; 0 outside the tensor.

    x: a descriptor of `descriptors`. at: (batch row, first row, residue, head), int32.
    """
    return tl.reshape(x.load([at[0], at[1] + start, at[2], at[3], 0]), [BLOCK_S, BLOCK_D])


@triton.jit
def store_tile(
    p, b, start, seqlen, stride_s,
    BLOCK_S: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the rows below seqlen and the features below HEAD_DIM, in the tensor's dtype."""
    o_s = start + tl.arange(0, BLOCK_S)
    o_d, m_d = features(HEAD_DIM, BLOCK_D)
    m = (o_s < seqlen)[:, None] & m_d[None, :]
    p_tile = p + (o_s.to(tl.int64) * stride_s)[:, None] + o_d[None, :]
    tl.store(p_tile, b.to(p.dtype.element_ty), mask=m)


@triton.jit
def load_rows(
    p, o_at, m_at,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALL: tl.constexpr = False,  # pyright: ignore[reportArgumentType]
):  # fmt: skip
    """Return rows at the int64 offsets o_at, `[rows, BLOCK_D]`; 0 where m_at is False.

    ALL: m_at is True everywhere.
    """
    o_d, m_d = features(HEAD_DIM, BLOCK_D)
    p_at = p + o_at[:, None] + o_d[None, :]
    if ALL:
        b = tl.load(p_at) if HEAD_DIM == BLOCK_D else tl.load(p_at, mask=m_d[None, :], other=0.0)
    else:
        b = tl.load(p_at, mask=m_at[:, None] & m_d[None, :], other=0.0)
    return b


@triton.jit
def store_rows(p, b, o_at, m_at, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store rows at the int64 offsets o_at where m_at is True, in the tensor's dtype."""
    o_d, m_d = features(HEAD_DIM, BLOCK_D)
    m = m_at[:, None] & m_d[None, :]
    tl.store(p + o_at[:, None] + o_d[None, :], b.to(p.dtype.element_ty), mask=m)
