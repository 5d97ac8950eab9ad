"""Count what the output layer's loss does on a device without data, at a 1B model's sizes.

    python -m tests.stand_in.loss RANK WORLD_SIZE

Prints a line of JSON for each way: logits kept, in four chunks, and kept without a gradient. Llama
3.2 1B's output layer in bf16 at 16,384 tokens, its vocabulary shared by all ranks.
"""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.live import LiveTensors
from tests.stand_in.counting import Counting
from tests.stand_in.cuda import install, leave

STAND_IN = install(*map(int, sys.argv[1:3]))

from lcdist.model.output_loss import VocabShard, output_losses  # noqa: E402

TOKENS, VOCAB, HIDDEN = 16_384, 128_256, 2048
PRODUCTS = ("aten.mm", "aten.addmm")


class Widest(TorchDispatchMode):
    """Notes the most elements of an fp32 tensor."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.elements = max(self.elements, x.numel())
        return made


def count(chunk: int | None, gradients: bool) -> dict[str, Any]:
    """Return operations by name, bytes at the peak, and elements of the widest fp32 tensor."""
    world_size = dist.get_world_size()
    group = dist.group.WORLD if world_size > 1 else None
    rows = VOCAB // world_size
    shard = VocabShard(dist.get_rank() * rows, rows, group)
    x, weight = (
        torch.empty(shape, dtype=torch.bfloat16, device="cuda", requires_grad=gradients)
        for shape in ((TOKENS, 1, HIDDEN), (rows, HIDDEN))
    )
    targets = torch.empty(TOKENS, 1, dtype=torch.int64, device="cuda")
    dout = torch.empty(TOKENS, 1, device="cuda")
    STAND_IN.launches.clear()
    with Widest() as widest, LiveTensors() as live, Counting() as counting:
        losses = output_losses(x, weight, targets, shard, chunk)
        if gradients:
            torch.autograd.backward(losses, dout)
    return {
        "kernels": dict(STAND_IN.launches),
        "operations": counting.device_operations,
        "peak": live.peak,
        "widest": widest.elements,
        "elsewhere": counting.cpu_operations + counting.copies,
        "waits": dict(STAND_IN.waits),
    }


with STAND_IN:
    for way in ((None, True), (4096, True), (None, False)):
        print(json.dumps(count(*way)), flush=True)
leave()
