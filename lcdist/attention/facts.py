"""`MethodFacts`: what the plan, the model and the tests know about an attention method."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from lcdist.attention.cache import CacheSpec, LayerCache
from lcdist.attention.context import AttentionContext, DecodeCache
from lcdist.attention.shape import HeadSlice, Shape, Traffic
from lcdist.layout import ContextLayout, pieces_needed

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, AttentionContext], Tensor]
Decode: TypeAlias = Callable[[Tensor, DecodeCache, AttentionContext], Tensor]


class ContextFunctions(NamedTuple):
    """Functions of a method that take an `AttentionContext`; `AttentionMethod` describes them."""

    attend: Attend
    reference: Attend
    decode: Decode | None = None
    attend_local: Attend | None = None


class KeywordFunctions(NamedTuple):
    """Functions of a method that take the keywords of `AttentionMethod`'s own functions."""

    attention: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    decode: Callable[..., Tensor] | None = None


def _all_of(options: Any) -> tuple[str, ...]:
    raise AssertionError("replaced when the method is made")


def _layout_multiple(options: Any, cp_size: int, kind: str = "contiguous") -> int:
    return pieces_needed(kind, cp_size)


def _no_parameters(options: Any, nheads: int) -> Mapping[str, Any]:
    return {}


def _accept_all(options: Any, layout: ContextLayout, heads: HeadSlice, tp_size: int) -> None:
    """Accept every combination: the default of `MethodFacts.check`."""


def out_and_lse(options: Any, shape: Shape, layout: ContextLayout) -> int:
    """Return the bytes of a layer's out and lse on a rank: the default of `kept_bytes`."""
    row = shape.head_dim * shape.itemsize + max(4, shape.itemsize)
    return shape.batch * layout.local_seqlen * shape.nheads * row


def _entry_a_rank(options: Any, layout: ContextLayout, heads: HeadSlice, tp_size: int) -> int:
    """Count an entry for each rank: the default of `plan_entries`."""
    return tp_size * layout.cp_size


def _same_options(options: Any, layer: int, nheads: int, nheads_kv: int) -> Any:
    return options


def _dot_product_scale(head_dim: int) -> float:
    return head_dim**-0.5


@dataclass(frozen=True, kw_only=True)
class MethodFacts:
    """Facts about an attention method, for the plan, the model and the tests.

    Attributes:
        name: its key in `METHODS`.
        paper: arXiv id.
        options: its frozen options dataclass, constructible without arguments.
        layouts: accepted layout kinds.
        exchange: the exchanges it uses: "ring", "shift", "gather", "swap".
        supports: a subset of "gqa": fewer key and value heads than query heads; "varlen": packed
            documents; "decode": generation with a cache; "dense": its weights are those of a dense
            softmax model, so that evaluation and generation may be dense, and are by default;
            "landmarks": the last token of every block must be the landmark; the loader puts it
            there; "rotated": instead of a rotary, q and k may come rotated by the tokens' positions
            inside their documents.
        multiple_of: `(options, cp_size, kind="contiguous")` -> the divisor that seqlen must have;
            default: what the layout needs. With cp_size = 1, packed documents must begin at its
            multiples; the loader aligns them.
        flops: `(options, shape)` -> floating-point operations of one layer's forward pass over the
            scores it computes, summed over ranks. A multiply-add counts two; softmax and rotation
            are left out.
        bytes: `(options, shape, layout)` -> `Traffic` of one layer. Methods whose traffic depends
            on the number of a head read shape.heads.
        kept_bytes: `(options, shape, layout)` -> most bytes that a rank keeps of one layer with
            train.recompute = "keep_attention", which are those that `attend` gives to
            `lcdist_kernels.tape.kept`; default: out and lse.
        layouts_for: `(options)` -> layout kinds, `layouts` or fewer.
        exchange_for: `(options)` -> exchanges, `exchange` or fewer.
        parameters: `(options, nheads)` -> name to shape of the learnable parameters. The last dim
            is nheads, one entry per query head of the whole model.
        initial: `(options, nheads)` -> name to initial value, fp32, with the same names and shapes.
        for_layer: `(options, layer, nheads, nheads_kv)` -> the options of layer number `layer`,
            from 0, of a model with so many heads, for methods whose layers differ.
        check: `(options, layout, heads, tp_size)` -> raises ValueError if the options conflict with
            each other, with the layout, with the model's heads (a HeadSlice of all of them) or with
            tensor parallelism. The message names field, value, legal values and remedy. The plan
            calls it before anything runs.
        default_scale: `(head_dim)` -> the softmax scale of a call that gives none.
        plan_entries: `(options, layout, heads, tp_size)` -> entries of the tables that a plan makes
            to count the bytes of one layer on all ranks; default: one a rank. The plan refuses too
            many.
        make_cache: `(spec)` -> the decoding cache of a layer. None: a cache of keys and values
            without rotation, which `decode` reads, on one context-parallel rank.
        impls: legal values of `impl`.
    """

    name: str
    paper: str
    options: type
    layouts: tuple[str, ...]
    exchange: tuple[str, ...]
    supports: frozenset[str]
    flops: Callable[[Any, Shape], int]
    bytes: Callable[[Any, Shape, ContextLayout], Traffic]
    multiple_of: Callable[..., int] = _layout_multiple
    kept_bytes: Callable[[Any, Shape, ContextLayout], int] = out_and_lse
    layouts_for: Callable[[Any], tuple[str, ...]] = _all_of
    exchange_for: Callable[[Any], tuple[str, ...]] = _all_of
    parameters: Callable[[Any, int], Mapping[str, tuple[int, ...]]] = _no_parameters
    initial: Callable[[Any, int], Mapping[str, Tensor]] = _no_parameters
    for_layer: Callable[[Any, int, int, int], Any] = _same_options
    check: Callable[[Any, ContextLayout, HeadSlice, int], None] = _accept_all
    default_scale: Callable[[int], float] = _dot_product_scale
    plan_entries: Callable[[Any, ContextLayout, HeadSlice, int], int] = _entry_a_rank
    make_cache: Callable[[CacheSpec], LayerCache] | None = None
    impls: tuple[str, ...] = ("auto", "torch", "reference")
    functions: ContextFunctions | KeywordFunctions

    def __post_init__(self) -> None:
        decodes = self.make_cache is not None or self.functions.decode is not None
        if "decode" in self.supports and not decodes:
            raise TypeError(f"{self.name}: supports decode, and has neither decode nor make_cache")
        if self.layouts_for is _all_of:
            object.__setattr__(self, "layouts_for", lambda options: self.layouts)
        if self.exchange_for is _all_of:
            object.__setattr__(self, "exchange_for", lambda options: self.exchange)
