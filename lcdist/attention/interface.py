"""`AttentionMethod`: what an attention method is, as facts and three functions.

Every method file ends in one `METHOD = AttentionMethod(...)`. The plan, the model, the tests and
the README's table use that object alone. CONTRIBUTING.md shows a complete method.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lcdist.attention.context import AttentionContext, DecodeCache
from lcdist.attention.facts import Attend, ContextFunctions, KeywordFunctions, MethodFacts
from lcdist.attention.shape import HeadSlice, Shape, Traffic
from lcdist.attention.shared.checks import check_shard, held_heads
from lcdist.exchange import Group
from lcdist.layout import ContextLayout
from lcdist_kernels import Rotary
from lcdist_kernels.common import check_impl, check_qkv, check_self

__all__ = ["AttentionContext", "AttentionMethod", "DecodeCache", "HeadSlice", "Shape", "Traffic"]


class AttentionMethod(MethodFacts):
    """One attention method: its facts, and `attention`, `reference` and `decode`.

    Arguments that these three share:

    - q, k, v: q and the output `[b, s, h, d]`, k and v `[b, s, h_kv, d]`, all un-rotated.
    - options: the method's options.
    - rotary: rotation of q and k; None for no rotation.
    - cu_seqlens: document borders in the whole sequence, int32 `[n + 1]`, the same for every row
      and on every rank. Positions restart in every document. Tokens after the last border form a
      document of their own.
    - softmax_scale: default `default_scale(head_dim)`.
    - params: learnable parameters, of the whole model's heads or of the tensor's.
    - heads: position of the tensor's heads in the model; None if it holds all.
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
            decode: (q, cache, ctx) -> output of new tokens against a `DecodeCache`; for a method
                without `make_cache`.
            attend_local: called in place of `attend` if cp_size = 1; None: `attend` does both.
            attention: a function with the keywords of `AttentionMethod.attention`, in place of
                `attend`. Then `reference` and `decode` take keywords as well, and the method does
                all checks and defaults itself.
            functions: all of them at once, as `dataclasses.replace` gives them.
            facts: the fields of `MethodFacts`.
        """
        if functions is None:
            chosen = attention if attend is None else attend
            if chosen is None or reference is None:
                raise TypeError("AttentionMethod needs reference, and attend or attention")
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
            layout: the cut of the sequence over the ranks of `group`.
            group: the context-parallel group; None for one process.
            impl: one of `impls`.

        Raises:
            ValueError: shapes, layout, group, documents, heads and options do not fit each other,
                `impl` is not built, or what it names is missing or does not take the tensors.
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
        Raises ValueError as `attention`.
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
    ) -> Tensor:
        """Return attention of new tokens over keys and values, theirs included.

        Only for a method that has `decode`; the others have a cache of their own (`make_cache`).

        No gradients; out is like q.

        Args:
            q: the new tokens, `[b, n, h, d]`.
            k_cache, v_cache: `[b, s_cache, h_kv, d]`, un-rotated; entry j belongs to position j.
                Entries after the greatest position are not read.
            positions: integers on the CPU, `[n]`, or `[b, n]` if rows differ in length.

        Raises:
            ValueError: shapes do not fit, or a position lies outside the cache.
        """
        functions = self.functions
        assert functions.decode is not None, f"{self.name} has a cache of its own"
        if isinstance(functions, KeywordFunctions):
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
            )
        check_qkv(q, k_cache, v_cache)
        heads = self._heads(q, k_cache, options, params, heads)
        scale, layout = self._scale(q, softmax_scale), _whole(k_cache)
        ctx = AttentionContext(options, layout, None, rotary, None, scale, params, heads, "auto")
        with torch.no_grad():
            return functions.decode(q, DecodeCache(k_cache, v_cache, positions), ctx)

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
