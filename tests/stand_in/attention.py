"""Every method and variant, forward and backward, on a device that is not there: a line each.

    python -m tests.stand_in.attention RANK IMPL...

One process, and rank RANK of four. What is wrong ends it.
"""

import sys
from collections.abc import Iterator
from itertools import product
from math import lcm

import torch

from tests.stand_in.cuda import StandIn, install, leave

RANKS = 4
STAND_IN = install(int(sys.argv[1]), RANKS)

from lcdist.layout import ContextLayout, pieces_needed  # noqa: E402
from lcdist_kernels import Rotary  # noqa: E402
from tests.attention.body import Variant, variants  # noqa: E402


def attend(variant: Variant, kind: str, cp_size: int, packed: bool, impl: str) -> None:
    method, options, head_dim = variant.method, variant.options, 64
    own = method.multiple_of(options, cp_size, kind)
    step = lcm(pieces_needed(kind, cp_size), own)
    layout = ContextLayout(kind, -(-512 // step) * step, cp_size, own)
    document = method.multiple_of(options, 1)
    half = layout.seqlen // document // 2 * document
    borders = torch.tensor([0, half, layout.seqlen], dtype=torch.int32) if packed else None
    leaves = [
        torch.randn(1, layout.local_seqlen, nheads, head_dim, dtype=torch.bfloat16, device="cuda")
        for nheads in (4, 2, 2)
    ]
    params = {name: x.to("cuda") for name, x in method.initial(options, 4).items()}
    leaves = [x.requires_grad_() for x in (*leaves, *params.values())]
    out = method.attention(
        *leaves[:3],
        options=options,
        layout=layout,
        group=torch.distributed.group.WORLD if cp_size > 1 else None,
        rotary=Rotary(10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)),
        cu_seqlens=borders,
        params=dict(zip(params, leaves[3:], strict=True)) or None,
        impl=impl,
    )
    got = [out, *torch.autograd.grad(out, leaves, torch.randn_like(out))]
    like = [leaves[0], *leaves]
    assert all(x.is_cuda and x.shape == y.shape for x, y in zip(got, like, strict=True))
    assert out.dtype == torch.bfloat16


def cases(variant: Variant) -> Iterator[tuple[str, int, bool, str]]:
    """Yield (layout kind, cp_size, packed, impl).

    Without documents, and in tiled torch, every other kind of layout does what the first one does.
    """
    sparse = getattr(variant.options, "top_k", None) is not None
    for kind, cp_size, packed, impl in product(
        variant.kinds, (1, RANKS), (False, True), sys.argv[2:]
    ):
        if kind != variant.kinds[0] and (cp_size == 1 or impl == "torch" or not packed):
            continue
        if impl == "torch" and not packed:
            continue
        # Whose blocks are fetched, and what tiled torch gathers, is in the data.
        if sparse and (cp_size > 1 or impl == "torch"):
            continue
        yield kind, cp_size, packed, impl


def main(stand_in: StandIn) -> None:
    with stand_in:
        for variant in variants():
            for case in cases(variant):
                stand_in.launches.clear()
                attend(variant, *case)
                kernels = sum(n for k, n in stand_in.launches.items() if "rotate" not in k)
                print(variant, *case, kernels, sep="|")
    print("waits", dict(stand_in.waits), sep="|")


main(STAND_IN)
leave()
