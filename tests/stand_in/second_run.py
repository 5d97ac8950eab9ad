"""Launches of a recomputed attention's two runs on a device that is not there, a line each as JSON.

    python -m tests.stand_in.second_run RANK

Every method and variant, in one process and as rank RANK of four. What is wrong ends it.
"""

import json
import sys
from math import lcm

import torch
from torch import Tensor

from tests.stand_in.cuda import StandIn, install, leave

RANKS = 4
STAND_IN = install(int(sys.argv[1]), RANKS)

from lcdist.exchange import traffic  # noqa: E402
from lcdist.layout import ContextLayout, pieces_needed  # noqa: E402
from lcdist.model.memory.recompute import recomputed  # noqa: E402
from tests.attention.body import Variant, variants  # noqa: E402

HEADS = (4, 2, 2)


def attend(variant: Variant, cp_size: int, stand_in: StandIn) -> None:
    method, options, kind = variant.method, variant.options, variant.kinds[0]
    own = method.multiple_of(options, cp_size, kind)
    step = lcm(pieces_needed(kind, cp_size), own)
    layout = ContextLayout(kind, -(-512 // step) * step, cp_size, own)
    shape = (1, layout.local_seqlen, sum(HEADS), 64)
    x = torch.randn(shape, dtype=torch.bfloat16, device="cuda").requires_grad_()
    params = {name: y.to("cuda") for name, y in method.initial(options, HEADS[0]).items()}
    runs = []

    def run(x: Tensor) -> Tensor:
        stand_in.launches.clear()
        with traffic() as sent:
            out = method.attention(
                *x.split(HEADS, 2),
                options=options,
                layout=layout,
                group=torch.distributed.group.WORLD if cp_size > 1 else None,
                params=params or None,
                impl="triton",
            )
        runs.append({"launches": dict(stand_in.launches), "sent": sent.total})
        return out

    out = recomputed(run, x, keep=True)
    out.backward(torch.randn_like(out))
    print(json.dumps({"of": str(variant), "cp_size": cp_size, "runs": runs}))


def main(stand_in: StandIn) -> None:
    with stand_in:
        for variant in variants():
            for cp_size in (1, RANKS):
                # Whose blocks are fetched is in the data.
                if cp_size == 1 or getattr(variant.options, "top_k", None) is None:
                    attend(variant, cp_size, stand_in)


main(STAND_IN)
leave()
