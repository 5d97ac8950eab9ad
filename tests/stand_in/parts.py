"""Count what the loss and the update of a training step do on a device without data.

    python -m tests.stand_in.parts RANK WORLD_SIZE CONFIG

Prints a line of JSON for each way of the loss: logits kept, in four chunks, and kept without a
gradient; Llama 3.2 1B's output layer in bf16 at 16,384 tokens, its vocabulary shared by all ranks.
Then one for the update of a configuration's weights, when tables of addresses exist.
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

from lcdist.config import load  # noqa: E402
from lcdist.distributed.mesh import build_mesh  # noqa: E402
from lcdist.hardware.peak import Peak  # noqa: E402
from lcdist.model.gradient import add_product  # noqa: E402
from lcdist.model.output_loss import VocabShard, output_losses  # noqa: E402
from lcdist.plan import make_plan  # noqa: E402
from lcdist.train.build import build_trainer, open_dataset  # noqa: E402
from tests.engines.internals import optimizer_of  # noqa: E402

TOKENS, VOCAB, HIDDEN = 16_384, 128_256, 2048


class Widest(TorchDispatchMode):
    """Notes the most elements of an fp32 tensor."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.elements = max(self.elements, x.numel())
        return made


def loss(chunk: int | None, gradients: bool) -> dict[str, Any]:
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
    # torch is asked once a process whether its product adds to fp32.
    one = torch.empty(1, 1, dtype=torch.bfloat16, device="cuda")
    add_product(torch.empty(1, 1, device="cuda"), one, one)
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


def update(path: str) -> dict[str, Any]:
    """Return operations, kernels and waits of an update, and the parameters that it is for."""
    config = load(path, ["model.num_layers=1"])
    plan = make_plan(config, dist.get_world_size())
    mesh = build_mesh(config.parallel, config.train.seed)
    trainer = build_trainer(plan, mesh, open_dataset(plan), Peak(1.0, "config"))
    trainer.engine.forward_backward([b.to(mesh.device) for b in trainer.loader.next_step()])
    trainer.engine.step(1e-3)
    STAND_IN.launches.clear()
    STAND_IN.waits.clear()
    with Counting() as counting:
        trainer.engine.step(1e-3)
    return {
        "parameters": sum(x.numel() for x in optimizer_of(trainer).masters),
        "kernels": dict(STAND_IN.launches),
        "operations": counting.device_operations,
        "bytes": counting.device_bytes,
        "elsewhere": counting.cpu_operations + counting.copies,
        "waits": dict(STAND_IN.waits),
    }


with STAND_IN:
    for way in ((None, True), (4096, True), (None, False)):
        print(json.dumps(loss(*way)), flush=True)
    print(json.dumps(update(sys.argv[3])), flush=True)
leave()
