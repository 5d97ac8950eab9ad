"""Libraries that our kernels are compared with, and masks for FlexAttention.

torch's SDPA, cuDNN through it, compiled FlexAttention (arXiv:2412.05496), and FlashAttention-4, -3
and -2 if installed. A block mask is built from its closed form, a stripe of queries at a time and
outside the timed region; built at once it would take a byte for each score.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from gpu_harness import Attend, Contender, Operator, Size
from place import DEVICE, HAS_GPU
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lcdist_kernels.scca import Rule

TILE = 128
# Number of (query, key) pairs whose mask is computed at once.
AT_ONCE = 1 << 26
FLASH = {
    "FlashAttention-4": "flash_attn.cute.interface",
    "FlashAttention-3": "flash_attn_interface",
    # FlashAttention-4 is in the same package, which may be there for it alone.
    "FlashAttention-2": "flash_attn.flash_attn_interface",
}

Seen = Callable[[Any, Tensor, Tensor], Tensor]
"""(head, i, j) -> whether query i sees key j; for integers, tensors that broadcast, and a trace."""


def causal_rivals(operator: Operator, note: str = "") -> list[Contender]:
    """Return every library for plain causal attention; `operator` must be full attention."""
    made = [Contender("torch sdpa", operator, lambda options, size: sdpa, note=note)]
    made += [Contender("cuDNN", operator, lambda options, size: cudnn, note=note)] * HAS_GPU
    made += [
        Contender(name, operator, lambda options, size, module=module: flash(module), note=note)
        for name, module in FLASH.items()
        if installed(module)
    ]

    def build(options: Any, size: Size) -> Attend:
        return flexed(block_mask(lambda h, i, j: j <= i, size.seqlen))

    return [*made, flex_contender("FlexAttention", operator, build, note)]


def flex_contender(
    name: str, operator: Operator, build: Callable[[Any, Size], Attend], note: str = ""
) -> Contender:
    """Return a contender for FlexAttention, which has no backward on a CPU."""
    words = [note, *["without a GPU forward alone"] * (not HAS_GPU)]
    said = "; ".join(word for word in words if word)
    return Contender(name, operator, build, stage=2, backward=HAS_GPU, note=said)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Run torch's scaled_dot_product_attention; torch chooses the kernel."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Run torch's scaled_dot_product_attention by cuDNN alone: torch may choose it, or not."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v)


def installed(module: str) -> bool:
    """Return whether a module can be found, its package as well."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def flash(module: str) -> Attend:
    """Return a function that runs a release of FlashAttention; some return (out, lse)."""
    attend = import_module(module).flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return run


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compile fn for one static shape, with a fresh compiler state; without a GPU return fn."""
    if not HAS_GPU:
        return fn
    # Otherwise a second length would be compiled as dynamic, and a ninth not at all.
    torch._dynamo.reset()
    return torch.compile(fn, dynamic=False)


def flexed(mask: BlockMask) -> Attend:
    """Return FlexAttention with a block mask."""
    attend = compiled(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return run


def block_mask(seen: Seen, seqlen: int, alike: Sequence[int] = (0,)) -> BlockMask:
    """Return FlexAttention's mask of `seen`.

    alike: for each head, the first head with the same mask.
    """
    tile = TILE if seqlen % TILE == 0 else seqlen
    tables = {head: _tiles(seen, head, seqlen, tile) for head in dict.fromkeys(alike)}
    blocks = []
    for which in range(2):
        table = torch.stack([tables[head][which] for head in alike])[None].to(torch.int8)
        order = table.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        blocks += [table.sum(-1, dtype=torch.int32), order]

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return seen(h, i, j)

    lengths = (seqlen, seqlen)
    return BlockMask.from_kv_blocks(
        *blocks, BLOCK_SIZE=tile, mask_mod=mask_mod, seq_lengths=lengths
    )


def _tiles(seen: Seen, head: int, seqlen: int, tile: int) -> tuple[Tensor, Tensor]:
    """Return which tiles are partly and which fully visible: bool `[tiles, tiles]`."""
    keys = torch.arange(seqlen, dtype=torch.int32, device=DEVICE)
    step = max(1, AT_ONCE // (seqlen * tile)) * tile
    some, every = [], []
    for rows in keys.split(step):
        pairs = seen(head, rows[:, None], keys[None])
        by_tile = pairs.view(len(rows) // tile, tile, seqlen // tile, tile)
        some.append(by_tile.any(3).any(1))
        every.append(by_tile.all(3).all(1))
    whole = torch.cat(every)
    return torch.cat(some) & ~whole, whole


def mask_of_rules(rules: Sequence[Rule], seqlen: int) -> BlockMask:
    """Return the mask of SCCA's rules, one for each query head."""
    kinds = list(dict.fromkeys(rule[:2] for rule in rules))
    kind_of = torch.tensor([kinds.index(rule[:2]) for rule in rules], device=DEVICE)
    shift_of = torch.tensor([rule.shift for rule in rules], dtype=torch.int32, device=DEVICE)

    def seen(h: Any, i: Tensor, j: Tensor) -> Tensor:
        pairs = Rule(*kinds[0], shift_of[h]).mask(i, j)  # pyright: ignore[reportArgumentType]
        for number, kind in enumerate(kinds[1:], 1):
            other = Rule(*kind, shift_of[h]).mask(i, j)  # pyright: ignore[reportArgumentType]
            pairs = torch.where(kind_of[h] == number, other, pairs)
        return pairs

    return block_mask(seen, seqlen, [rules.index(rule) for rule in rules])
