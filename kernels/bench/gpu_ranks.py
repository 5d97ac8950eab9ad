"""Compare every method on rings of 1 to 64 virtual ranks of one GPU with float64.

Kernels round; the question is whether more ranks round more. Errors of out, dq, dk and dv are root
mean squares relative to the float64 result. growth: the largest of them divided by that of one
rank. Each method has its preferred layout.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from math import lcm
from threading import Lock
from typing import Any
from unittest.mock import patch

import torch
from gpu_harness import FAILURES, Operator, Size, forget, said_by
from place import HAS_GPU
from torch import Tensor
from triton import JITFunction

from lcdist.attention import METHODS
from lcdist.exchange import VirtualGroup, group_rank
from lcdist.layout import ContextLayout, pieces_needed

OPERATORS = [
    Operator(rotated=True),
    Operator("coca", rotated=True),
    Operator("scca", {"chunk_size": 512}, trial={"chunk_size": 4}, rotated=True),
    Operator("scca", {"pattern": "sda", "dilation": 4}, rotated=True),
    Operator("tensorized", {"modes": (32,)}, trial={"modes": (4,)}, rotated=True),
    Operator("landmark", {"block_size": 32}, trial={"block_size": 4}, rotated=True),
    # Rotated in bf16 it would legitimately select other blocks than in float64.
    Operator(
        "landmark",
        {"block_size": 32, "top_k": 8, "select_tokens": 64},
        trial={"block_size": 4, "top_k": 2, "select_tokens": 8},
    ),
    Operator("lssar", rotated=True),
]
PARTS = ("out", "dq", "dk", "dv")
COLUMNS = ["method", "layout", "cp_size", "seqlen", "head_dim", "dtype", *PARTS, "growth", "note"]


def ranks_size() -> tuple[Size, tuple[int, ...]]:
    """Return the size of the whole sequence, and numbers of ranks, the baseline first."""
    if HAS_GPU:
        return Size(8192, 4, 2, 64), (1, 2, 8, 64)
    return Size(16, 4, 2, 16, "float32"), (1, 2)


def layout_of(operator: Operator, seqlen: int, cp_size: int) -> ContextLayout:
    """Return a zigzag layout if legal, else the first legal one.

    Raises ValueError for a wrong length.
    """
    method, options = METHODS[operator.method], operator.options_at(gate=False)
    legal = method.layouts_for(options)
    kind = "zigzag" if "zigzag" in legal else legal[0]
    own = method.multiple_of(options, cp_size, kind)
    return ContextLayout(kind, seqlen, cp_size, lcm(pieces_needed(kind, cp_size), own))


def rank_rows(
    operator: Operator, size: Size, cp_sizes: tuple[int, ...], impl: str = "triton"
) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of ranks; after a failure the next number is tried."""
    inputs = size.inputs()
    truth, alone = operator.reference(size, inputs), None
    for cp_size in cp_sizes:
        row = blank(operator, size, cp_size)
        try:
            layout = layout_of(operator, size.seqlen, cp_size)
            row["layout"] = layout.kind
            got = on_ranks(operator, size, layout, inputs, impl)
            errors = [
                ((g.double() - t).norm() / t.norm()).item() for g, t in zip(got, truth, strict=True)
            ]
            alone = alone or (errors if cp_size == 1 else None)
            row |= {name: f"{error:.3g}" for name, error in zip(PARTS, errors, strict=True)}
            if alone:
                growth = max(e / max(a, 1e-30) for e, a in zip(errors, alone, strict=True))
                row["growth"] = f"{growth:.3g}"
        except FAILURES as failure:
            row["note"] = said_by(failure)
        yield row
        forget()


def blank(operator: Operator, size: Size, cp_size: int | str, note: str = "") -> dict[str, Any]:
    """Return a row without results."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"method": str(operator), "cp_size": cp_size, "note": note}
    return row | {name: getattr(size, name) for name in ("seqlen", "head_dim", "dtype")}


def on_ranks(
    operator: Operator, size: Size, layout: ContextLayout, inputs: list[Tensor], impl: str
) -> list[Tensor]:
    """Compute [out, dq, dk, dv] of the whole sequence, each rank a thread."""
    method, options = METHODS[operator.method], operator.options_at(gate=False)
    rotary = operator.rotary(size, torch.float32)

    def one(rank: Any) -> list[Tensor]:
        number = group_rank(rank)
        *mine, dout = (layout.shard(x.detach(), number, 1) for x in inputs)
        leaves = [x.requires_grad_() for x in mine]
        more = {"options": options, "layout": layout, "rotary": rotary, "impl": impl}
        out = method.attention(*leaves, group=rank if layout.cp_size > 1 else None, **more)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    with one_thread_compiles():
        parts = VirtualGroup(layout.cp_size).run(one)
    return [layout.unshard(list(part), 1) for part in zip(*parts, strict=True)]


def one_thread_compiles() -> AbstractContextManager[Any]:
    """Return a context in which one thread at a time launches kernels.

    Otherwise 64 ranks that meet a new kernel at once would compile it 64 times.
    """
    lock, launch = Lock(), JITFunction.run

    def in_turn(kernel: Any, *args: Any, **words: Any) -> Any:
        with lock:
            return launch(kernel, *args, **words)

    taking_turns: Callable[..., Any] = in_turn
    return patch.object(JITFunction, "run", taking_turns)
