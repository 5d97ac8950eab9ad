"""Find the collective that this process is in, from the stacks of its own Python threads.

A running process does no bookkeeping for it. A blocked collective is a function of
torch.distributed, or a wait in `lcdist.exchange`, on the stack of the thread that called it,
including backward threads. On CUDA the host runs ahead of its collectives and is found where it
waits for the device; NCCL's own watchdog names the kernel.
"""

import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType

EXCHANGE, VERBS = "lcdist.exchange.", ("ring", "shift", "gather", "swap")
TRACED_PACKAGES = ("lcdist.", "lcdist_kernels.", "megatron.")
# Modules of Megatron that wait for a handle without a function of torch.distributed on the stack.
MEGATRON_WAITS = {
    "megatron.core.distributed.": "the reduction of gradients",
    "megatron.core.pipeline_parallel.p2p_communication": "a pipeline send or receive",
}
# Decorators and helpers between a collective and its caller.
WRAPPERS = ("wrapper", "inner", "wait", "_wait", "batch_isend_irecv")


@dataclass(frozen=True)
class RankLocation:
    """Location of one process; any field may be empty.

    `collective` is the one that it is in, `place` the innermost line of our code or Megatron's,
    `method` the attention method at work.
    """

    collective: str
    place: str
    method: str


def locate_rank(methods: Mapping[str, str]) -> RankLocation:
    """Return the location of the thread that is in a collective, else of the main thread.

    The calling thread is left out.

    Args:
        methods: name of an attention method by the module of its `attention`.
    """
    caller = threading.get_ident()
    stacks = [
        list(_outward(frame)) for ident, frame in sys._current_frames().items() if ident != caller
    ]
    locations = [_locate_stack(stack, methods) for stack in stacks]
    in_collective = [location for location in locations if location.collective]
    in_our_code = [location for location in locations if location.place]
    return next(iter(in_collective or in_our_code), RankLocation("", "", ""))


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _locate_stack(stack: list[FrameType], methods: Mapping[str, str]) -> RankLocation:
    modules = [frame.f_globals.get("__name__", "") for frame in stack]
    collective, place, method = "", "", ""
    for frame, module in zip(stack, modules, strict=True):
        if not collective:
            collective = _collective(frame, module)
        if not place and module.startswith(TRACED_PACKAGES):
            file = module.replace(".", "/")
            place = f"{file}.py:{frame.f_lineno} in {frame.f_code.co_name}"
        method = method or _method(module, methods)
    return RankLocation(collective, place, method)


def _collective(frame: FrameType, module: str) -> str:
    name = frame.f_code.co_name
    if module.startswith("torch.distributed.") and name not in WRAPPERS:
        return name
    for prefix, text in MEGATRON_WAITS.items():
        if module.startswith(prefix):
            return f"{text} ({name})"
    verb = module.removeprefix(EXCHANGE)
    return f"{verb} ({name})" if module.startswith(EXCHANGE) and verb in VERBS else ""


def _method(module: str, methods: Mapping[str, str]) -> str:
    for attention_module, name in methods.items():
        # A method of lcdist is a package: its ring and its plan are modules of the same package.
        package = attention_module.removesuffix(".attention")
        if module == attention_module or module.startswith(f"{package}."):
            return name
    return ""
