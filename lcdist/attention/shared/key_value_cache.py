"""Decoding cache of keys and values, and what other methods' caches use of it."""

import torch
from torch import Tensor

from lcdist.attention.cache import CacheSpec, LayerCache, NewTokens, SoftmaxCache, row_calls
from lcdist.attention.shared.token_store import TokenStore
from lcdist_kernels.decode import decode_fwd
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

    def partial(self, queries: Tensor, new: NewTokens) -> tuple[Tensor, Tensor]:
        if new.count == 1 and self.keeps_keys and decodes_by_kernel(self.spec.impl, queries):
            spans = [(row, 0, self.store.length(row)) for row in new.rows]
            if not self.store.buffers:
                return nothing_seen(queries)
            k, v = self.store.buffers
            out, lse = decode_fwd(queries[:, 0], k, v, spans, self.spec.softmax_scale)
            return out[:, None], lse[..., None]
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
