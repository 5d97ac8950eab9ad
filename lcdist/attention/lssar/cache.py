"""Decoding cache of LSSA and LSSAR: directions of keys, and values (arXiv:2501.13428).

The number of keys that a query sees scales its scores only, so directions stay valid as a text
grows. A single new token is scored first; then values are read only where its weight is not zero,
that is above the mean of its scores.
"""

from typing import Any

import torch
from torch import Tensor

from lcdist.attention.cache import (
    CacheSpec,
    LayerCache,
    NewTokens,
    exchange_partials,
    gather_rows,
    row_calls,
    split_lse,
)
from lcdist.attention.lssar.ring import reweight_of
from lcdist.attention.shared.key_value_cache import store_tokens
from lcdist.attention.shared.token_store import TokenStore
from lcdist.exchange import gather, group_size
from lcdist_kernels import lssar as ops
from lcdist_kernels.lssar import Band, Threshold
from lcdist_kernels.lssar.rows import exponent


class DirectionCache(LayerCache):
    """Keeps directions of keys, in the wider of fp32 and their dtype, and values."""

    def __init__(self, spec: CacheSpec) -> None:
        super().__init__(spec)
        self.store = TokenStore(spec.rows, spec.held(self.page))
        self.reweight = reweight_of(spec.options)

    @property
    def nbytes(self) -> int:
        return self.store.nbytes

    def attend(self, q: Tensor, k: Tensor, v: Tensor, new: NewTokens) -> Tensor:
        group = self.spec.group
        own = new.own(group)
        store_tokens(self, self.store, own, new, self._directions(k, own), v)
        queries = gather_rows(self._directions(q, own), new, group)
        calls = [_RowCall(self, *call) for call in row_calls(new, queries)]
        self._find_thresholds(calls)
        sums = torch.cat([torch.cat(call.sums(), -1) for call in calls])
        if group_size(group) > 1:
            sums = exchange_partials(sums, new, group).sum(0)
        out, total = split_lse(sums)
        return (out / ops.divisor(total)).to(q.dtype)

    def _directions(self, x: Tensor, positions: Tensor) -> Tensor:
        table = positions[0] if len(positions) == 1 else positions
        return ops.directions(x, self.spec.rotary, table)

    def _find_thresholds(self, calls: "list[_RowCall]") -> None:
        """Give each row's queries the threshold over all ranks' keys."""
        if self.reweight is None:
            return
        found = torch.stack([call.total_and_top() for call in calls])  # [rows, 2, h, n]
        if group_size(self.spec.group) > 1:
            parts = gather(found[None], self.spec.group, 0).wait()
            found = torch.stack((parts[:, :, 0].sum(0), parts[:, :, 1].amax(0)), 1)
        for call, (total, top) in zip(calls, found, strict=True):
            shares = ops.mean_shares(call.band.counts, self.reweight, call.queries)
            call.threshold = ops.row_threshold(total[None], top[None], shares)


class _RowCall:
    """One row's new queries, and the keys and values that this rank keeps of the row.

    queries: `[1, n, h, d]`, times their logit scales.
    """

    def __init__(
        self, cache: DirectionCache, row: int, positions: Tensor, directions: Tensor
    ) -> None:
        starts, k_ids = torch.zeros_like(positions), cache.store.positions(row)
        self.band = Band(positions, starts, k_ids)
        scales = ops.logit_scales(self.band.counts, cache.spec.softmax_scale, directions)
        self.queries, self.reweight = directions * scales, cache.reweight
        self.threshold: Threshold = ops.no_threshold(self.queries)
        self.kept: Any = cache.store.read(row) if len(k_ids) else ()

    def total_and_top(self) -> Tensor:
        """Return the sum and the maximum of f over this rank's keys: `[2, h, n]`."""
        if not self.kept:
            return torch.zeros_like(self.threshold.mean).repeat(2, 1, 1)
        return torch.cat(ops.lssar_sums(self.queries, self.kept[0], self.band))

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return A `[1, n, h, d]` and W `[1, n, h, 1]` over this rank's keys."""
        if not self.kept:
            out = torch.zeros_like(self.queries)
            return out, out[..., :1]
        if len(self.band.q_idx) == 1:
            return self._token_sums()
        k, v = self.kept
        found = ops.lssar_fwd(self.queries, k, v, self.band, self.threshold, self.reweight, False)
        return found.out, found.total.transpose(1, 2)[..., None]

    def _token_sums(self) -> tuple[Tensor, Tensor]:
        """Return the sums of a single query; on a CPU only values with weight are read.

        On a GPU the host would have to wait for their numbers.
        """
        keys, values = self.kept
        nheads_kv = keys.shape[2]
        by_head = self.queries[0, 0].unflatten(0, (nheads_kv, -1))  # [h_kv, g, d]
        scores = by_head @ keys[0].permute(1, 2, 0)
        scores = torch.logaddexp(scores, torch.zeros_like(scores))
        mean, inverse = (x.view(nheads_kv, -1, 1) for x in self.threshold)
        weights = scores.sub_(mean).clamp_min_(0).mul_(inverse)
        power = exponent(self.reweight)
        # 0 ** p is 0 for every legal power.
        weights = weights.pow_(power)
        total = weights.sum(-1).view(1, 1, -1, 1)
        if weights.is_cuda:
            out = weights @ values[0].transpose(0, 1).to(weights.dtype)
            return out.flatten(0, 1)[None, None], total
        out = []
        for head in range(nheads_kv):
            read = weights[head].any(0).nonzero().flatten()
            out.append(weights[head][:, read] @ values[0, read, head].to(weights.dtype))
        return torch.cat(out)[None, None], total
