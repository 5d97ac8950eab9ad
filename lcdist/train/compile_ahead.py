"""Compile the kernels of a run in the background, while its model and weights load."""

import contextlib
import logging
import threading
from collections.abc import Iterator

import torch

from lcdist.distributed.mesh import Mesh
from lcdist.model.kernel_calls import call_kernels
from lcdist.plan import Plan

log = logging.getLogger(__name__)
# An upper bound of what a method's call holds, as multiples of q.
ATTENTION_TENSORS = 24


@contextlib.contextmanager
def compile_ahead(plan: Plan, mesh: Mesh) -> Iterator[None]:
    """Compile this rank's kernels during the block; at its end wait until they are.

    Does nothing where there is no GPU or no kernel is used, and where memory is short. An error is
    logged; the first step then compiles the kernels.
    """
    if not _is_useful(plan, mesh.device):
        yield
        return
    thread = threading.Thread(target=_compile, args=(plan, mesh), name="compile-kernels")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _is_useful(plan: Plan, device: torch.device) -> bool:
    if device.type != "cuda" or plan.config.attention.impl in ("torch", "reference"):
        return False
    shape = plan.shape
    heads = shape.attention_shape(plan.config.train.micro_batch_size, 0).nheads
    needed = ATTENTION_TENSORS * shape.local_tokens * heads * shape.head_dim * shape.itemsize
    return plan.memory.state_bytes + needed <= plan.hardware.memory_bytes


def _compile(plan: Plan, mesh: Mesh) -> None:
    """Call the kernels on a stream of their own, so that loading does not wait for them."""
    device = mesh.device
    try:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream(device)
            with torch.cuda.stream(stream):
                call_kernels(plan, mesh)
            # Tables that the calls made serve the training as well, on another stream.
            stream.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    except Exception as error:
        log.warning("kernels are compiled by the first step, not before: %s", error)
