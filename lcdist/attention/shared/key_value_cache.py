"""Decoding cache of keys and values, and what other methods' caches use of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lcdist.attention.cache import CacheSpec, LayerCache, NewTokens, SoftmaxCache, row_calls
from lcdist.attention.shared.token_store import TokenStore
from lcdist_kernels.decode import decode_fwd, decode_reference
from lcdist_kernels.full import TORCH_IMPL, AttentionImpl, select_block_impl
from lcdist_kernels.triton_common import use_kernels


class KeyValueCache(SoftmaxCache):
    """Keeps keys as they are multiplied, and values.

    keeps_keys: whether the store has keys, and not what they are made from.
    """

    keeps_keys = True

    def __init__(self, spec: CacheSpec) -> None:
        super().__init__(spec)
        self.store = TokenStore(spec.rows, spec.held(self.page))

    @property
    def nbytes(self) -> int:
        return self.store.nbytes

    def keep(self, k: Tensor, v: Tensor, positions: Tensor, new: NewTokens) -> None:
        store_tokens(self, self.store, positions, new, self.rotate(k, positions), v)

    def keys(self, kept: Tensor, positions: Tensor) -> Tensor:
        """Return the keys to multiply, `[1, n, h_kv, d]`, from what the store keeps."""
        return kept

    def _single(self, queries: Tensor, new: NewTokens) -> tuple[Tensor, Tensor]:
        """Return the partial of one query of each row, which sees all that is kept of the row."""
        impl, scale = self.spec.impl, self.spec.softmax_scale
        if self.keeps_keys:
            spans = [(row, 0, self.store.length(row)) for row in new.rows]
            k, v = self.store.buffers
            return decode_single(queries, k, v, spans, scale, impl)
        results = []
        for row, _, q in row_calls(new, queries):
            if not self.store.length(row):
                results.append(nothing_seen(q))
                continue
            k_ids, (kept, v) = self.store.positions(row), self.store.read(row)
            k = self.keys(kept, k_ids)
            results.append(decode_single(q, k, v, [(0, 0, len(k_ids))], scale, impl))
        return join_rows(results)

    def partial(self, queries: Tensor, new: NewTokens) -> tuple[Tensor, Tensor]:
        if not self.store.buffers:
            return nothing_seen(queries)
        if new.count == 1:
            return self._single(queries, new)
        impl = block_impl(self.spec.impl, queries)
        results = []
        for row, positions, q in row_calls(new, queries):
            if not self.store.length(row):
                results.append(nothing_seen(q))
                continue
            kept, v = self.store.read(row)
            k_ids = self.store.positions(row)
            k, starts = self.keys(kept, k_ids), torch.zeros_like(positions)
            results.append(impl.fwd(q, k, v, positions, starts, k_ids, self.spec.softmax_scale))
        return join_rows(results)


def store_tokens(
    cache: LayerCache, store: TokenStore, positions: Tensor, new: NewTokens, *parts: Tensor
) -> None:
    """Append those of this rank's new tokens that it keeps to `store`.

    Args:
        cache: says which ones.
        store: where to.
        positions: of this rank's new tokens, `[rows, n]`.
        new: all new tokens.
        parts: `[rows, n, ...]` each.
    """
    kept = cache.keeps(positions, new)
    for i, row in enumerate(new.rows):
        if kept[i].all():
            store.append(row, positions[i], *(x[i : i + 1] for x in parts))
        elif kept[i].any():
            index = kept[i].nonzero().flatten()
            chosen = index.to(parts[0].device)
            store.append(row, positions[i, index], *(x[i : i + 1, chosen] for x in parts))


def block_impl(impl: str, like: Tensor) -> AttentionImpl:
    """Return the implementation of attention over a cache that `impl` means."""
    if impl in ("torch", "reference"):
        return TORCH_IMPL
    return select_block_impl(impl, like, "attention over a cache")


def decode_single(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Sequence[tuple[int, int, int]],
    scale: float,
    impl: str,
    step: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the partial of single queries `[r, 1, h, d]`; other arguments as of `decode_fwd`."""
    decode = decode_fwd if decodes_by_kernel(impl, q) else decode_reference
    out, lse = decode(q[:, 0], k, v, spans, scale, step)
    return out[:, None], lse[..., None]


def decodes_by_kernel(impl: str, like: Tensor) -> bool:
    """Return whether `impl` means the decode kernels for single queries `[r, 1, h, d]`."""
    if impl in ("torch", "reference"):
        return False
    return use_kernels("triton" if impl == "triton" else "auto", like, "attention of new tokens")


def nothing_seen(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the partial of queries `[b, s, h, d]` that see no key."""
    out = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
    return out, out.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)


def join_rows(partials: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return partials of rows as one."""
    if len(partials) == 1:
        return partials[0]
    outs, lses = zip(*partials, strict=True)
    return torch.cat(outs), torch.cat(lses)
