"""Decoding cache of methods that have none of their own: keys and values, without rotation."""

from collections.abc import Callable

import torch
from torch import Tensor

from lcdist.attention.cache import CacheSpec, LayerCache, NewTokens, row_calls
from lcdist.attention.shared.token_store import TokenStore
from lcdist.exchange import group_size


class PlainCache(LayerCache):
    """Keeps what `AttentionMethod.decode` reads, and calls it row by row.

    Args:
        decode: of the method.
        name: of the method, for messages.
        spec: of the layer.

    Raises:
        ValueError: context parallelism.
    """

    def __init__(self, decode: Callable[..., Tensor], name: str, spec: CacheSpec) -> None:
        super().__init__(spec)
        if group_size(spec.group) > 1:
            raise ValueError(
                f"attention method {name!r} has no decoding cache of its own, so it generates with "
                f"parallel.cp_size = 1, not {group_size(spec.group)}"
            )
        self._decode, self._store = decode, TokenStore(spec.rows, spec.capacity)

    @property
    def nbytes(self) -> int:
        return self._store.nbytes

    def attend(self, q: Tensor, k: Tensor, v: Tensor, new: NewTokens) -> Tensor:
        spec, out = self.spec, []
        for row, positions, *one in row_calls(new, q, k, v):
            self._store.append(row, positions, *one[1:])
            result = self._decode(
                one[0],
                *self._store.read(row),
                options=spec.options,
                positions=positions,
                rotary=spec.rotary,
                softmax_scale=spec.softmax_scale,
                params=spec.params,
                heads=spec.heads,
            )
            out.append(result)
        return torch.cat(out)
