"""`AttentionMethod`: what an attention method is, as facts and three functions.

Every method file ends in one `METHOD = AttentionMethod(...)`. The plan, the model, the tests and
the README's table use that object alone. CONTRIBUTING.md shows a complete method.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lcdist.attention.context import AttentionContext, DecodeCache
from lcdist.attention.shape import HeadSlice, Shape, Traffic
from lcdist.attention.shared.checks import check_shard, held_heads
from lcdist.exchange import Group
from lcdist.layout import ContextLayout
from lcdist_kernels import Rotary
from lcdist_kernels.common import check_impl, check_qkv, check_self

__all__ = ["AttentionContext", "AttentionMethod", "DecodeCache", "HeadSlice", "Shape", "Traffic"]

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, AttentionContext], Tensor]
Decode: TypeAlias = Callable[[Tensor, DecodeCache, AttentionContext], Tensor]


class ContextFunctions(NamedTuple):
    """Functions of a method that take an `AttentionContext`; `AttentionMethod` describes them."""

    attend: Attend
    reference: Attend
    decode: Decode
    attend_local: Attend | None = None


class KeywordFunctions(NamedTuple):
    """Functions of a method that take the keywords of `AttentionMethod`'s own functions."""

    attention: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    decode: Callable[..., Tensor]


def _all_of(options: Any) -> tuple[str, ...]:
    raise AssertionError("replaced when the method is made")


def _no_parameters(options: Any, nheads: int) -> Mapping[str, Any]:
    return {}


def _accept_all(options: Any, layout: ContextLayout, heads: HeadSlice, tp_size: int) -> None:
    """Accept every combination: the default of `MethodFacts.check`."""


def _same_options(options: Any, layer: int, nheads: int, nheads_kv: int) -> Any:
    return options


def _dot_product_scale(head_dim: int) -> float:
    return head_dim**-0.5


@dataclass(frozen=True, kw_only=True)
class MethodFacts:
    """Facts about an attention method, for the plan, the model and the tests.

    name: its key in `METHODS`.
    paper: arXiv id.
    options: its frozen options dataclass, constructible without arguments.
    layouts: accepted layout kinds.
    exchange: the exchanges it uses: "ring", "shift", "gather", "swap".
    supports: a subset of
        "gqa": fewer key and value heads than query heads;
        "varlen": packed documents;
        "decode": generation with a cache;
        "dense": its weights are those of a dense softmax model, so that evaluation and generation
            may be dense, and are by default;
        "landmarks": the last token of every block must be the landmark; the loader puts it there;
        "state": `decode` needs more of the past than keys and values.
    multiple_of(options, cp_size, kind="contiguous"): the divisor that seqlen must have. With
        cp_size = 1, packed documents must begin at its multiples; the loader aligns them.
    flops(options, shape): floating-point operations of one layer's forward pass over the scores it
        computes, summed over ranks. A multiply-add counts two; softmax and rotation are left out.
    bytes(options, shape, layout): `Traffic` of one layer. Methods whose traffic depends on the
        number of a head read shape.heads.
    layouts_for(options): layout kinds, `layouts` or fewer.
    exchange_for(options): exchanges, `exchange` or fewer.
    parameters(options, nheads): name to shape of the learnable parameters. The last dim is nheads,
        one entry per query head of the whole model.
    initial(options, nheads): name to initial value, fp32, with the same names and shapes.
    for_layer(options, layer, nheads, nheads_kv): the options of layer number `layer`, from 0, of a
        model with so many heads, for methods whose layers differ.
    check(options, layout, heads, tp_size): raises ValueError if the options conflict with each
        other, with the layout, with the model's heads (a HeadSlice of all of them) or with tensor
        parallelism. The message names field, value, legal values and remedy. The plan calls it
        before anything runs.
    default_scale(head_dim): the softmax scale of a call that gives none.
    impls: legal values of `impl`.
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
    layouts_for: Callable[[Any], tuple[str, ...]] = _all_of
    exchange_for: Callable[[Any], tuple[str, ...]] = _all_of
    parameters: Callable[[Any, int], Mapping[str, tuple[int, ...]]] = _no_parameters
    initial: Callable[[Any, int], Mapping[str, Tensor]] = _no_parameters
    for_layer: Callable[[Any, int, int, int], Any] = _same_options
    check: Callable[[Any, ContextLayout, HeadSlice, int], None] = _accept_all
    default_scale: Callable[[int], float] = _dot_product_scale
    impls: tuple[str, ...] = ("auto", "torch", "reference")
    functions: ContextFunctions | KeywordFunctions

    def __post_init__(self) -> None:
        if self.layouts_for is _all_of:
            object.__setattr__(self, "layouts_for", lambda options: self.layouts)
        if self.exchange_for is _all_of:
            object.__setattr__(self, "exchange_for", lambda options: self.exchange)


class AttentionMethod(MethodFacts):
    """One attention method: its facts, and `attention`, `reference` and `decode`.

    Shapes below: q and out `[b, s, h, d]`, k and v `[b, s, h_kv, d]`, all un-rotated.
    """

    def __init__(
        self,
        *,
        attend: Attend | None = None,
        reference: Callable[..., Tensor] | None = None,
        decode: Callable[..., Tensor] | None = None,
        attend_local: Attend | None = None,
        attention: Callable[..., Tensor] | None = None,
        functions: ContextFunctions | KeywordFunctions | None = None,
        **facts: Any,
    ) -> None:
        """Make a method of functions that take an `AttentionContext`.

        Args:
            attend: (q, k, v, ctx) -> this rank's shard of the output, differentiable.
            reference: (q, k, v, ctx) -> the same on the whole sequence, dense, in one process, for
                any float dtype.
            decode: (q, cache, ctx) -> output of new tokens against a `DecodeCache`.
            attend_local: called in place of `attend` if cp_size = 1; None: `attend` does both.
            attention: a function with the keywords of `AttentionMethod.attention`, in place of
                `attend`. Then `reference` and `decode` take keywords as well, and the method does
                all checks and defaults itself.
            functions: all of them at once, as `dataclasses.replace` gives them.
            facts: the fields of `MethodFacts`.
        """
        if functions is None:
            chosen = attention if attend is None else attend
            if chosen is None or reference is None or decode is None:
                raise TypeError("AttentionMethod needs reference, decode, and attend or attention")
            if attend is None:
                functions = KeywordFunctions(chosen, reference, decode)
            else:
                functions = ContextFunctions(chosen, reference, decode, attend_local)
        super().__init__(functions=functions, **facts)

    @property
    def module(self) -> str:
        """The module that computes this method, as stack frames name it."""
        return self.functions[0].__module__

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        options: Any,
        layout: ContextLayout,
        group: Group,
        rotary: Rotary | None = None,
        cu_seqlens: Tensor | None = None,
        softmax_scale: float | None = None,
        params: Mapping[str, Tensor] | None = None,
        heads: HeadSlice | None = None,
        impl: str = "auto",
    ) -> Tensor:
        """Return this rank's shard of the attention of a whole sequence, shaped like q.

        Args:
            q, k, v: this rank's tokens as `layout` cuts them, s = local_seqlen.
            options: the method's options.
            layout: the cut of the sequence over the ranks of `group`.
            group: the context-parallel group; None for one process.
            rotary: rotation of q and k; None for no rotation.
            cu_seqlens: document borders in the whole sequence, int32 `[n + 1]`, the same for every
                row and on every rank. Positions restart in every document. Tokens after the last
                border form a document of their own.
            softmax_scale: default `default_scale(head_dim)`.
            params: learnable parameters, of the whole model's heads or of the tensor's.
            heads: position of the tensor's heads in the model; None if it holds all.
            impl: one of `impls`.

        Raises:
            ValueError: shapes, layout, group, documents, heads and options do not fit each other,
                `impl` is not built, or "triton" does not take the tensors.
        """
        functions = self.functions
        if isinstance(functions, KeywordFunctions):
            return functions.attention(
                q,
                k,
                v,
                options=options,
                layout=layout,
                group=group,
                rotary=rotary,
                cu_seqlens=cu_seqlens,
                softmax_scale=softmax_scale,
                params=params,
                heads=heads,
                impl=impl,
            )
        check_impl(impl, self.name, self.impls)
        check_qkv(q, k, v)
        check_shard(q, k, layout, group)
        heads = self._heads(q, k, options, params, heads)
        scale = self._scale(q, softmax_scale)
        ctx = AttentionContext(
            options, layout, group, rotary, cu_seqlens, scale, params, heads, impl
        )
        if layout.cp_size == 1 and functions.attend_local is not None:
            return functions.attend_local(q, k, v, ctx)
        return functions.attend(q, k, v, ctx)

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        options: Any,
        rotary: Rotary | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        softmax_scale: float | None = None,
        params: Mapping[str, Tensor] | None = None,
        heads: HeadSlice | None = None,
    ) -> Tensor:
        """Return dense attention of a whole sequence in one process, in any float dtype.

        positions: rotary positions, integers `[s]` or `[b, s]`; default: from 0 in every document.
        The other arguments, and errors, are as in `attention`.
        """
        functions = self.functions
        if isinstance(functions, KeywordFunctions):
            return functions.reference(
                q,
                k,
                v,
                options=options,
                rotary=rotary,
                positions=positions,
                cu_seqlens=cu_seqlens,
                softmax_scale=softmax_scale,
                params=params,
                heads=heads,
            )
        check_self(q, k, v)
        heads = self._heads(q, k, options, params, heads)
        scale, layout = self._scale(q, softmax_scale), _whole(q)
        ctx = AttentionContext(
            options, layout, None, rotary, cu_seqlens, scale, params, heads, "reference", positions
        )
        return functions.reference(q, k, v, ctx)

    def decode(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        options: Any,
        positions: Tensor,
        rotary: Rotary | None = None,
        softmax_scale: float | None = None,
        params: Mapping[str, Tensor] | None = None,
        heads: HeadSlice | None = None,
        state: dict[str, Any] | None = None,
    ) -> Tensor:
        """Return attention of new tokens over a cache that holds their own keys and values already.

        No gradients; out is like q.

        Args:
            q: the new tokens, `[b, n, h, d]`.
            k_cache, v_cache: `[b, s_cache, h_kv, d]`, un-rotated; entry j belongs to position j.
                Entries after the greatest position are not read.
            positions: integers on the CPU, `[n]`, or `[b, n]` if rows differ in length.
            state: only with "state" in `supports`: a dict that the method keeps for this layer,
                empty for an empty cache. Tokens then come in order, without gaps.

        Raises:
            ValueError: shapes do not fit, or a position lies outside the cache.
        """
        functions = self.functions
        if isinstance(functions, KeywordFunctions):
            more = {} if state is None else {"state": state}
            return functions.decode(
                q,
                k_cache,
                v_cache,
                options=options,
                positions=positions,
                rotary=rotary,
                softmax_scale=softmax_scale,
                params=params,
                heads=heads,
                **more,
            )
        check_qkv(q, k_cache, v_cache)
        heads = self._heads(q, k_cache, options, params, heads)
        scale, layout = self._scale(q, softmax_scale), _whole(k_cache)
        ctx = AttentionContext(options, layout, None, rotary, None, scale, params, heads, "auto")
        with torch.no_grad():
            return functions.decode(q, DecodeCache(k_cache, v_cache, positions, state), ctx)

    def _scale(self, q: Tensor, softmax_scale: float | None) -> float:
        return self.default_scale(q.shape[3]) if softmax_scale is None else softmax_scale

    def _heads(
        self,
        q: Tensor,
        k: Tensor,
        options: Any,
        params: Mapping[str, Tensor] | None,
        heads: HeadSlice | None,
    ) -> HeadSlice:
        """Return the position of q's heads in the model.

        Raises ValueError if the heads do not fit, or if `params` are not this method's.
        """
        held = held_heads(heads, q, k)
        legal = self.parameters(options, held.nheads)
        if params and params.keys() != legal.keys():
            raise ValueError(
                f"params = {sorted(params)}: {self.name} attention has "
                f"{sorted(legal) or 'no learnable extras'}"
            )
        return held


def _whole(x: Tensor) -> ContextLayout:
    """Return the layout of one rank that holds all tokens of `x` `[b, s, h, d]`."""
    return ContextLayout("contiguous", x.shape[1], 1)
