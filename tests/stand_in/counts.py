"""Count the operations of a warm forward and backward besides kernels, on a device without data.

    python -m tests.stand_in.counts

Prints a line of JSON for each method and length, and one for the layers of a model. Batch 1, bf16,
32 query heads, 8 key heads, head_dim 128; one document and no rotation, except in line "packed".
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from tests.stand_in.counting import Counting
from tests.stand_in.cuda import install, leave

STAND_IN = install(0, 1)

from lcdist.attention.scca.pattern import for_layer, model_rules  # noqa: E402
from lcdist.config.schema import SccaOptions  # noqa: E402
from lcdist_kernels import (  # noqa: E402
    Rotary,
    coca_attention,
    full_attention,
    landmark_attention,
    lssar_attention,
    scca_attention,
    tensorized_attention,
)
from lcdist_kernels.full import library_choice  # noqa: E402
from lcdist_kernels.tensorized import ModeGrid  # noqa: E402

NHEADS, NHEADS_KV, HEAD_DIM = 32, 8, 128
PATTERNS = {
    "fixed": SccaOptions(pattern="fixed"),
    "flow": SccaOptions(pattern="flow"),
    "sda": SccaOptions(pattern="sda", dilation=4),
    "longmixed": SccaOptions(pattern="longmixed"),
}

GRIDS = {
    "tensorized (512)": ModeGrid((512,), local_blocks=2, hop_heads="kv"),
    "tensorized (32, 32)": ModeGrid((32, 32), hop_heads="kv"),
}


class PythonCalls:
    """Lists calls of Python functions of the two packages, steps of generators included.

    The backward runs in a thread of autograd, which only hooks on tensors can reach.
    """

    def __init__(self) -> None:
        self.names: list[str] = []

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and "/lcdist" in frame.f_code.co_filename:
            self.names.append(frame.f_code.co_qualname)

    def __enter__(self) -> "PythonCalls":
        self.names.clear()
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def in_backward(self, out: Tensor, leaves: Sequence[Tensor]) -> None:
        """List also the calls between the gradient of `out` and the first of the leaves'."""
        out.register_hook(lambda _: sys.setprofile(self._note))
        for leaf in leaves:
            leaf.register_hook(lambda _: sys.setprofile(None))


CALLS = PythonCalls()


@contextmanager
def counted() -> Iterator[dict[str, Any]]:
    """Fill a dictionary with what is done inside."""
    found: dict[str, Any] = {}
    STAND_IN.launches.clear()
    with Counting() as counting, CALLS:
        yield found
    found |= {
        "python calls": len(CALLS.names),
        "kernels": dict(STAND_IN.launches),
        "device operations": counting.device_operations,
        "device bytes": counting.device_bytes,
        "cpu operations": counting.cpu_operations,
        "copies": counting.copies,
    }


def scca(options: SccaOptions) -> Callable[..., Tensor]:
    """Return attention with a pattern's rules."""
    rules = model_rules(options, NHEADS, NHEADS_KV)
    return lambda *qkv: scca_attention(*qkv, rules=rules)


def tensorized(grid: ModeGrid) -> Callable[..., Tensor]:
    """Return attention over a grid's modes; a learnt bias for one mode, the initial for two."""
    bias = None
    if len(grid.modes) == 1:
        bias = torch.zeros(1, NHEADS, device="cuda", requires_grad=True)
    return lambda *qkv: tensorized_attention(*qkv, grid=grid, branch_bias=bias)


def packed(seqlen: int) -> Callable[..., Tensor]:
    """Return attention of the flow pattern with rotation and two documents."""
    rules = model_rules(PATTERNS["flow"], NHEADS, NHEADS_KV)
    borders = torch.tensor([0, seqlen // 3, seqlen], dtype=torch.int32)
    rotary = Rotary(torch.ones(HEAD_DIM // 2))
    return lambda *qkv: scca_attention(*qkv, rules=rules, rotary=rotary, cu_seqlens=borders)


def inputs(seqlen: int) -> list[Tensor]:
    """Return q, k and v."""
    return [
        torch.empty(1, seqlen, n, HEAD_DIM, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for n in (NHEADS, NHEADS_KV, NHEADS_KV)
    ]


def warm(attend: Callable[..., Tensor], seqlen: int) -> dict[str, Any]:
    """Return what the second forward and the second backward do."""
    qkv, found = inputs(seqlen), {}
    dout = torch.empty_like(qkv[0])
    for _ in range(2):
        with counted() as found["forward"]:
            out = attend(*qkv)
        CALLS.in_backward(out, qkv)
        with counted() as found["backward"]:
            torch.autograd.grad(out, qkv, dout)
    return found


def second_step(layers: int, seqlen: int) -> dict[str, Any]:
    """Return what the second step of a model's staggered layers does."""
    options = SccaOptions(pattern="flow")
    staggered = [for_layer(options, layer, NHEADS, NHEADS_KV) for layer in range(layers)]
    assert len({option.stagger for option in staggered}) == layers
    model, found = [scca(option) for option in staggered], {}
    qkv = inputs(seqlen)
    dout = torch.empty_like(qkv[0])
    for _ in range(2):
        with counted() as found["step"]:
            outs = [layer(*qkv) for layer in model]
            for out in reversed(outs):
                torch.autograd.grad(out, qkv, dout)
    return found


def main() -> None:
    """Print all lines."""
    cases = {name: scca(options) for name, options in PATTERNS.items()} | {
        "full": lambda *qkv: full_attention(*qkv, impl="triton"),
        "coca": lambda *qkv: coca_attention(*qkv, impl="triton"),
        "landmark": lambda *qkv: landmark_attention(*qkv, block_size=64),
        "top_k": lambda *qkv: landmark_attention(*qkv, block_size=64, top_k=64, select_tokens=4096),
        "lssar": lssar_attention,
    }
    with STAND_IN:
        cases |= {name: tensorized(grid) for name, grid in GRIDS.items()}
        for name, attend in cases.items():
            for seqlen in (4096, 131072):
                print(json.dumps({"of": name, "seqlen": seqlen, **warm(attend, seqlen)}))
        # At greater lengths the choice is made in several parts.
        by_token = partial(landmark_attention, block_size=64, top_k=64)
        print(json.dumps({"of": "top_k by token", "seqlen": 4096, **warm(by_token, 4096)}))
        print(json.dumps({"of": "packed", "seqlen": 4096, **warm(packed(4096), 4096)}))
        print(json.dumps({"of": "layers", "seqlen": 8192, **second_step(32, 8192)}))
        # A library's self-test reads results, which are not there.
        library_choice.tested = lambda *like: None
        print(json.dumps({"of": "cudnn", "seqlen": 4096, **warm(full_attention, 4096)}), flush=True)


main()
leave()
