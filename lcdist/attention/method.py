"""What an attention method is: its capabilities as data, and three functions.

Every method file ends in one `METHOD = AttentionMethod(...)`; the plan, the model, the tests and
the README's table ask that object and nothing else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lcdist.layout import ContextLayout


@dataclass(frozen=True)
class HeadSlice:
    """Which of the model's heads a tensor holds: query heads [first, first + nheads), and so on."""

    first: int
    nheads: int
    first_kv: int
    nheads_kv: int


@dataclass(frozen=True)
class Shape:
    """The shape of one layer's attention on one rank, for counting.

    batch, nheads and nheads_kv as that rank holds them; itemsize: bytes an element of q, k, v;
    seqlen: global length in tokens, needed by `flops` alone (`bytes` takes a layout).
    """

    batch: int
    nheads: int
    nheads_kv: int
    head_dim: int
    itemsize: int
    seqlen: int | None = None


class Traffic(NamedTuple):
    """Bytes that each rank sends in one layer: one entry a rank, forward and backward."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class AttentionMethod:
    """One attention method.

    name: its key in `METHODS`. paper: arXiv id. options: its frozen options dataclass,
    constructible without arguments. layouts: accepted layout kinds. exchange: the verbs it uses.
    supports: of "gqa", "varlen" (packed documents), "decode".

    layouts_for(options) -> layout kinds, `layouts` or fewer.
    multiple_of(options, cp_size, kind="contiguous") -> what seqlen must be a multiple of.
    flops(options, shape) -> floating-point operations of one layer's forward over the scores it
    touches, all ranks together; a multiply-add counts two; softmax and rotation are left out.
    bytes(options, shape, layout) -> Traffic.
    parameters(options, nheads) -> name to shape of the learnable extras.

    reference(q, k, v, *, options, rotary, positions, cu_seqlens, softmax_scale, params, heads)
    -> out: dense, one process, any float dtype.
    attention(q, k, v, *, options, layout, group, rotary, cu_seqlens, softmax_scale, params, heads,
    impl) -> out: this rank's shard of tokens as `layout` cuts them.
    decode(q, k_cache, v_cache, *, options, positions, rotary, softmax_scale, params, heads)
    -> out: new tokens against a cache.

    q and out are `[b, s, h, d]`, k and v `[b, s, h_kv, d]`; q, k and the cache are un-rotated.
    """

    name: str
    paper: str
    options: type
    layouts: tuple[str, ...]
    exchange: tuple[str, ...]
    supports: frozenset[str]
    layouts_for: Callable[[Any], tuple[str, ...]]
    multiple_of: Callable[..., int]
    flops: Callable[[Any, Shape], int]
    bytes: Callable[[Any, Shape, ContextLayout], Traffic]
    parameters: Callable[[Any, int], Mapping[str, tuple[int, ...]]]
    reference: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    decode: Callable[..., Tensor]
