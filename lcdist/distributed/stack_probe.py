"""Where this process is right now, read off its own Python stacks: no bookkeeping while it runs.

A blocked collective is a Python function of torch.distributed, or a wait in `lcdist.exchange`, on
the stack of the thread that called it, a backward thread's included. On CUDA the host runs ahead of
its collectives and is found where it waits for the device; NCCL's own watchdog names the kernel.
"""

import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType

EXCHANGE, VERBS = "lcdist.exchange.", ("ring", "shift", "gather", "swap")
OURS = ("lcdist.", "lcdist_kernels.", "megatron.")
# Where Megatron waits for a handle itself, with no function of torch.distributed on the stack.
WAITS = {
    "megatron.core.distributed.": "the reduction of gradients",
    "megatron.core.pipeline_parallel.p2p_communication": "a pipeline send or receive",
}
# Decorators and helpers between a collective and whoever called it.
WRAPPERS = ("wrapper", "inner", "wait", "_wait", "batch_isend_irecv")


@dataclass(frozen=True)
class RankLocation:
    """collective: the one this process is in, or "". place: innermost line of ours. method: the
    attention method at work, or ""."""

    collective: str
    place: str
    method: str


def locate_rank(methods: Mapping[str, str]) -> RankLocation:
    """Of all threads but the caller's, the one in a collective, else the main one.

    methods: the name of an attention method by its `AttentionMethod.module`.
    """
    me = threading.get_ident()
    stacks = [list(_outward(f)) for ident, f in sys._current_frames().items() if ident != me]
    found = [_of_stack(stack, methods) for stack in stacks]
    busy = [one for one in found if one.collective]
    placed = [one for one in found if one.place]
    return next(iter(busy or placed), RankLocation("", "", ""))


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _of_stack(stack: list[FrameType], methods: Mapping[str, str]) -> RankLocation:
    modules = [frame.f_globals.get("__name__", "") for frame in stack]
    collective, place, method = "", "", ""
    for frame, module in zip(stack, modules, strict=True):
        if not collective:
            collective = _collective(frame, module)
        if not place and module.startswith(OURS):
            file = module.replace(".", "/")
            place = f"{file}.py:{frame.f_lineno} in {frame.f_code.co_name}"
        method = method or _method(module, methods)
    return RankLocation(collective, place, method)


def _collective(frame: FrameType, module: str) -> str:
    name = frame.f_code.co_name
    if module.startswith("torch.distributed.") and name not in WRAPPERS:
        return name
    for home, what in WAITS.items():
        if module.startswith(home):
            return f"{what} ({name})"
    verb = module.removeprefix(EXCHANGE)
    return f"{verb} ({name})" if module.startswith(EXCHANGE) and verb in VERBS else ""


def _method(module: str, methods: Mapping[str, str]) -> str:
    for home, name in methods.items():
        # A method of lcdist is a package: its ring and its plan are modules beside `home`.
        package = home.removesuffix(".attention")
        if module == home or module.startswith(f"{package}."):
            return name
    return ""
