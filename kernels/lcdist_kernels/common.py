"""Checks shared by all operators: tensor shapes, `impl` names and document borders."""

import itertools
import logging
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")

logger = logging.getLogger("lcdist_kernels")

IMPLS = ("auto", "cudnn", "fa3", "fa4", "triton", "torch", "reference")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q `[b, s_q, h, d]` and k, v `[b, s_k, h_kv, d]` fit each other.

    h must be a multiple of h_kv. All three must have one floating dtype and one device.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"{shapes}: expected q [b, s, h, d] and k, v of one shape [b, s, h_kv, d]")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes}: batch and head_dim of q and of k, v must be equal")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{shapes}: nheads = {q.shape[2]} must be a multiple of nheads_kv = {k.shape[2]}"
        )
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"dtypes q {q.dtype}, k {k.dtype}, v {v.dtype}: expected one floating dtype"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q on {q.device}, k on {k.device}, v on {v.device}: expected one device")


def check_self(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless `check_qkv` holds and q, k, v have the same number of tokens."""
    check_qkv(q, k, v)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} tokens, k and v have {k.shape[1]}: must be the same")


def check_impl(impl: str, method: str, built: tuple[str, ...]) -> None:
    """Raise ValueError unless `impl` is one of `built`, the implementations of `method`.

    "triton": the kernels. "torch": the tiled implementation. "reference": the dense one. "auto",
    unless the method says otherwise: the kernels on CUDA, tiled torch on a CPU.
    """
    if impl not in built:
        known = "is not available for this method" if impl in IMPLS else "is unknown"
        raise ValueError(
            f"impl = {impl!r} {known}: {method} attention has {', '.join(built)}; use one of these"
        )


def resolve_scale(softmax_scale: float | None, head_dim: int) -> float:
    """Return softmax_scale, by default head_dim ** -0.5."""
    return head_dim**-0.5 if softmax_scale is None else softmax_scale


def positive_scale(q: Tensor, softmax_scale: float) -> tuple[Tensor, float]:
    """Return q and a scale of the same scores, at least 0: kernels keep the maximum before it."""
    return (-q, -softmax_scale) if softmax_scale < 0 else (q, softmax_scale)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over tokens: the wider of fp32 and `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def document_starts(cu_seqlens: Tensor | None, index: Tensor, seqlen: int) -> Tensor:
    """Return the first token of each token's document: int64 like `index`, on the CPU.

    Args:
        cu_seqlens: document borders `[n + 1]`, int32 or int64, from 0, not decreasing, at most
            `seqlen`. Tokens after the last border form a document of their own. None: one document.
        index: global token numbers, int64 on the CPU.
        seqlen: tokens of the whole sequence.

    Raises:
        ValueError: cu_seqlens has another shape, dtype or order.
    """
    documents = document_borders(cu_seqlens, seqlen)
    if documents is None:
        return torch.zeros_like(index)
    borders = torch.tensor(documents)
    return borders[torch.searchsorted(borders, index, right=True) - 1]


class TensorNotes:
    """Cache of values read from tensors: dropped when a tensor is freed or written to.

    A value must not hold the tensor or a view of it, which would keep it from being freed.
    """

    # Enough for a ring of 64 ranks.
    MOST_KEYS = 64

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._notes: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def find(self, x: Tensor, key: Any, make: Callable[[], T]) -> T:
        """Return what `make` read from x under `key`; call it if x has no such note."""
        # An inference tensor does not count the times it is written to.
        if x.is_inference():
            return make()
        version = x._version
        with self._lock:
            known = self._notes.get(x)
            if known is not None and known[0] == version and key in known[1]:
                return known[1][key]
        value = make()
        with self._lock:
            known = self._notes.get(x)
            if known is None or known[0] != version or len(known[1]) >= self.MOST_KEYS:
                self._notes[x] = version, {key: value}
            else:
                known[1][key] = value
        return value


_BORDERS = TensorNotes()


def document_borders(cu_seqlens: Tensor | None, seqlen: int) -> tuple[int, ...] | None:
    """Return cu_seqlens as numbers, which can be the key of a plan; None: one document.

    A tensor is read again only if it was written to. Arguments and errors as in `document_starts`.
    """
    if cu_seqlens is None:
        return None
    return _BORDERS.find(cu_seqlens, seqlen, lambda: read_borders(cu_seqlens, seqlen))


def read_borders(cu_seqlens: Tensor, seqlen: int) -> tuple[int, ...]:
    """Return cu_seqlens as numbers. Raise ValueError if they are not legal."""
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens of shape {tuple(cu_seqlens.shape)}, {cu_seqlens.dtype}: "
            "expected one int32 table [n + 1], the same for every row of the batch"
        )
    borders = cu_seqlens.tolist()
    rising = all(a <= b for a, b in itertools.pairwise(borders))
    if not borders or borders[0] != 0 or not rising or borders[-1] > seqlen:
        raise ValueError(
            f"cu_seqlens = {borders}: must start with 0, not decrease and "
            f"end at most at seqlen = {seqlen}"
        )
    return tuple(borders)


@cache
def log_choice(choice: str) -> None:
    """Log which implementation impl = "auto" selects and why, once per process."""
    logger.info(choice)
