"""Decoding cache of CoCA: tau, half as large as a key, and values (arXiv:2309.08646)."""

from torch import Tensor

from lcdist.attention.cache import CacheSpec, NewTokens
from lcdist.attention.shared.key_value_cache import KeyValueCache, store_tokens
from lcdist_kernels.coca import (
    TORCH_IMPL,
    CoCAImpl,
    check_variant,
    collinear,
    rotary_angles,
    select_coca_impl,
)


class TauCache(KeyValueCache):
    """Keeps tau and values; keys follow from tau and positions."""

    keeps_keys = False

    def __init__(self, spec: CacheSpec) -> None:
        super().__init__(spec)
        self.variant = spec.options.variant
        self._impl = TORCH_IMPL

    def queries(self, q: Tensor, positions: Tensor) -> Tensor:
        check_variant(self.variant, q.shape[3])
        self._impl = self._impl_for(q)
        angles = rotary_angles(self.spec.rotary, _table(positions), q, q.shape[3])
        return self._impl.queries(q, angles, self.variant)

    def keep(self, k: Tensor, v: Tensor, positions: Tensor, new: NewTokens) -> None:
        store_tokens(self, self.store, positions, new, collinear(k), v)

    def keys(self, kept: Tensor, positions: Tensor) -> Tensor:
        angles = rotary_angles(self.spec.rotary, positions, kept, 2 * kept.shape[3])
        return self._impl.keys(kept, angles, self.variant)

    def _impl_for(self, like: Tensor) -> CoCAImpl:
        """Return what makes queries and keys: kernels in the model's dtype, torch in a wide one."""
        if self.spec.impl in ("torch", "reference"):
            return TORCH_IMPL
        return select_coca_impl(self.spec.impl, like, "coca attention over a cache")


def _table(positions: Tensor) -> Tensor:
    """Return positions `[rows, n]`, or `[n]` of a single row, whose table layers find again."""
    return positions[0] if len(positions) == 1 else positions
