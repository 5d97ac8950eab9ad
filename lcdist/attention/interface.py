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
    """Which of the model's heads a tensor holds: those from `first` on, as many as it has.

    first: of the query heads, out of the whole model's nheads; first_kv: of the key and value
    heads, out of the whole model's nheads_kv. Patterns follow these numbers, so that tensor
    parallelism does not change the function.
    """

    first: int
    nheads: int
    first_kv: int
    nheads_kv: int


@dataclass(frozen=True)
class Shape:
    """The shape of one layer's attention on one rank, for counting.

    batch, nheads and nheads_kv as that rank holds them; itemsize: bytes an element of q, k, v;
    seqlen: global length in tokens, needed by `flops` alone (`bytes` takes a layout); heads: which
    of the model's heads they are, None for all.
    """

    batch: int
    nheads: int
    nheads_kv: int
    head_dim: int
    itemsize: int
    seqlen: int | None = None
    heads: HeadSlice | None = None


class Traffic(NamedTuple):
    """Bytes that each rank sends in one layer: one entry a rank, forward and backward."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]


def _all_of(options: Any) -> tuple[str, ...]:
    raise AssertionError("replaced when the method is made")


def _nothing_to_learn(options: Any, nheads: int) -> Mapping[str, Any]:
    return {}


def _nothing_to_refuse(options: Any, layout: ContextLayout, heads: HeadSlice, tp_size: int) -> None:
    """Every combination is good: see `AttentionMethod.check`."""


def _every_layer_alike(options: Any, layer: int, nheads: int, nheads_kv: int) -> Any:
    return options


@dataclass(frozen=True, kw_only=True)
class AttentionMethod:
    """One attention method.

    name: its key in `METHODS`. paper: arXiv id. options: its frozen options dataclass,
    constructible without arguments. layouts: accepted layout kinds. exchange: the verbs it uses.
    supports: of "gqa", "varlen" (packed documents), "decode", "dense" (its weights are those of a
    dense softmax model, so that evaluation and generation may be dense, and are by default),
    "landmarks" (the last token of every block must be the landmark, which the loader puts there),
    "state" (decode needs more of the past than keys and values: see there).

    layouts_for(options) -> layout kinds, `layouts` or fewer. exchange_for(options) -> likewise.
    multiple_of(options, cp_size, kind="contiguous") -> what seqlen must be a multiple of; for
    cp_size = 1, packed documents must begin at such multiples, and the loader sees to it.
    flops(options, shape) -> floating-point operations of one layer's forward over the scores it
    touches, all ranks together; a multiply-add counts two; softmax and rotation are left out.
    bytes(options, shape, layout) -> Traffic; shape.heads numbers the heads where it matters.
    parameters(options, nheads) -> name to shape of the learnable extras; the last dim is nheads,
    one entry a query head of the whole model.
    initial(options, nheads) -> name to initial value, fp32, of the same names and shapes.
    for_layer(options, layer, nheads, nheads_kv) -> the options of layer number `layer` (from 0) of
    a model with so many heads, where layers take turns.

    check(options, layout, heads, tp_size) raises ValueError, naming field, value, legal values and
    remedy, where options do not go with each other, with the layout, with a model of so many heads
    (a HeadSlice of all of them) or with tensor parallelism; the plan calls it before anything runs.
    impls: legal values of impl.

    reference(q, k, v, *, options, rotary, positions, cu_seqlens, softmax_scale, params, heads)
    -> out: dense, one process, any float dtype.
    attention(q, k, v, *, options, layout, group, rotary, cu_seqlens, softmax_scale, params, heads,
    impl) -> out: this rank's shard of tokens as `layout` cuts them.
    decode(q, k_cache, v_cache, *, options, positions, rotary, softmax_scale, params, heads)
    -> out: new tokens against a cache. With "state" in supports also takes state: a dict, empty
    for an empty cache, which decode keeps for this layer; tokens then come in order, all of them.

    q and out are `[b, s, h, d]`, k and v `[b, s, h_kv, d]`; q, k and the cache are un-rotated.
    params: the learnable extras, whole or the slice that belongs to the tensor's heads.
    """

    name: str
    paper: str
    options: type
    layouts: tuple[str, ...]
    exchange: tuple[str, ...]
    supports: frozenset[str]
    multiple_of: Callable[..., int]
    flops: Callable[[Any, Shape], int]
    bytes: Callable[[Any, Shape, ContextLayout], Traffic]
    reference: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    decode: Callable[..., Tensor]
    layouts_for: Callable[[Any], tuple[str, ...]] = _all_of
    exchange_for: Callable[[Any], tuple[str, ...]] = _all_of
    parameters: Callable[[Any, int], Mapping[str, tuple[int, ...]]] = _nothing_to_learn
    initial: Callable[[Any, int], Mapping[str, Tensor]] = _nothing_to_learn
    for_layer: Callable[[Any, int, int, int], Any] = _every_layer_alike
    check: Callable[[Any, ContextLayout, HeadSlice, int], None] = _nothing_to_refuse
    impls: tuple[str, ...] = ("auto", "torch", "reference")

    def __post_init__(self) -> None:
        if self.layouts_for is _all_of:
            object.__setattr__(self, "layouts_for", lambda options: self.layouts)
        if self.exchange_for is _all_of:
            object.__setattr__(self, "exchange_for", lambda options: self.exchange)
