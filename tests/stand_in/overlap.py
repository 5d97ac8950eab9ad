"""The order of kernels, messages and waits of every method on one of four ranks: JSON lines.

    python -m tests.stand_in.overlap RANK

In the layout that gives every rank equal work. With top_k every rank requests every block, as a
number that the host reads from the device is 1, so a sequence is short.
"""

import json
import sys
from math import lcm

import torch

from tests.stand_in.counting import Counting
from tests.stand_in.cuda import StandIn, install, leave

RANKS, HEAD_DIM, SEQLEN, SHORT = 4, 64, 8192, 96
STAND_IN = install(int(sys.argv[1]), RANKS)

from lcdist.layout import ContextLayout, pieces_needed  # noqa: E402
from lcdist_kernels import Rotary  # noqa: E402
from tests.attention.body import Variant, variants  # noqa: E402


def trace(variant: Variant, stand_in: StandIn) -> dict[str, list[str]]:
    """Return the events of a forward and a backward, and operations when warm.

    The events are those of the first call with one document. Operations are those of a second call:
    on the device with one document, of the host, if large, with one and with two.
    """
    method, options = variant.method, variant.options
    kind = "zigzag" if "zigzag" in variant.kinds else variant.kinds[0]
    own = method.multiple_of(options, RANKS, kind)
    step = lcm(pieces_needed(kind, RANKS), own)
    seqlen = SEQLEN if getattr(options, "top_k", None) is None else SHORT
    layout = ContextLayout(kind, -(-seqlen // step) * step, RANKS, own)
    params = {name: x.to("cuda") for name, x in method.initial(options, 4).items()}
    shape = (1, layout.local_seqlen)
    qkv = [torch.randn(*shape, n, HEAD_DIM, dtype=torch.bfloat16, device="cuda") for n in (4, 2, 2)]
    leaves = [x.requires_grad_() for x in (*qkv, *params.values())]
    rotary = Rotary(10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    document = method.multiple_of(options, 1)
    half = layout.seqlen // document // 2 * document
    found: dict[str, list[str]] = {"on the host": []}
    for borders in (None, torch.tensor([0, half, layout.seqlen], dtype=torch.int32)):
        for warm in (False, True):
            with Counting() as counting:
                stand_in.events.clear()
                out = method.attention(
                    *leaves[:3],
                    options=options,
                    layout=layout,
                    group=torch.distributed.group.WORLD,
                    rotary=rotary,
                    cu_seqlens=borders,
                    params=dict(zip(params, leaves[3:], strict=True)) or None,
                    impl="triton",
                )
                found.setdefault("forward", stand_in.events.copy())
                on_device = counting.device_operations
                forward, on_device[:] = on_device.copy(), []
                dout = torch.randn_like(out)
                stand_in.events.clear()
                torch.autograd.grad(out, leaves, dout)
                found.setdefault("backward", stand_in.events.copy())
            if warm:
                found.setdefault("forward operations", forward)
                found.setdefault("backward operations", on_device[1:])
                found["on the host"] += [*counting.cpu_operations, *counting.copies]
    return found


with STAND_IN:
    for each in variants():
        STAND_IN.waits.clear()
        STAND_IN.posted = 0
        found = trace(each, STAND_IN)
        print(json.dumps({"of": str(each), **found, "waits": dict(STAND_IN.waits)}))
leave()
