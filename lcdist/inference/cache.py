"""Decoding cache of a whole model: a `LayerCache` for each layer of this rank."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import lcm

from torch import Tensor

from lcdist.attention import AttentionMethod
from lcdist.attention.cache import CacheSpec, LayerCache, NewTokens, SwapCount
from lcdist.attention.shared.plain_cache import PlainCache
from lcdist.model.core_attention import LongContextAttention


@dataclass(frozen=True)
class CacheSize:
    """Say what a decoding cache holds.

    Attributes:
        rows: Texts that are continued at once.
        capacity: Greatest number of tokens of a text.
        length: Length that the rotation is made for, where it depends on the length.
        device_blocks: As in `CacheSpec`.
    """

    rows: int
    capacity: int
    length: int
    device_blocks: int | None = None


class ModelCache:
    """Caches of a rank's layers, for texts with one rotation.

    Args:
        layers: attention of every layer on this rank.
        size: how many texts and tokens it holds.

    Raises:
        ValueError: a method's options do not fit decoding on this mesh.
    """

    def __init__(self, layers: Iterable[LongContextAttention], size: CacheSize) -> None:
        self._layers = {
            layer.layer_number: cache_of(layer.method, spec_of(layer, size)) for layer in layers
        }
        # Tokens of the forward pass that runs; all layers read them.
        self.new = NewTokens((), (), 0)

    @property
    def page(self) -> int:
        """Tokens that stay together on a context-parallel rank in every layer."""
        return lcm(*(cache.page for cache in self._layers.values()))

    @property
    def nbytes(self) -> int:
        """Bytes on this rank's device."""
        return sum(cache.nbytes for cache in self._layers.values())

    @property
    def swaps(self) -> SwapCount | None:
        """Sum of what the layers copied from host memory; None if all caches are on the device."""
        return SwapCount.total(*(cache.swaps for cache in self._layers.values()))

    def looks_ahead(self, layer_number: int) -> bool:
        """Return whether a layer's cache wants to know what the layer will read."""
        return self._layers[layer_number].looks_ahead

    def expect(self, layer_number: int, q: Tensor) -> None:
        """Tell a layer's cache about which queries it will get; as `LayerCache.expect`."""
        self._layers[layer_number].expect(q, self.new)

    def attend(self, layer_number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep the new tokens of a layer and return their attention; as `LayerCache.attend`."""
        out = self._layers[layer_number].attend(q, k, v, self.new)
        following = self._layers.get(layer_number + 1)
        if self.new.count == 1 and following is not None and following.looks_ahead:
            following.post()
        return out


def cache_of(method: AttentionMethod, spec: CacheSpec) -> LayerCache:
    """Return an empty cache of a layer.

    Raises ValueError if the options do not fit each other or the group.
    """
    if method.make_cache is not None:
        return method.make_cache(spec)
    return PlainCache(method.decode, method.name, spec)


def spec_of(layer: LongContextAttention, size: CacheSize) -> CacheSpec:
    """Return the description of a layer's attention."""
    head_dim, scale = layer.config.kv_channels, layer.softmax_scale
    assert head_dim is not None
    return CacheSpec(
        options=layer.options,
        rotary=layer.rotary(size.length),
        softmax_scale=layer.method.default_scale(head_dim) if scale is None else scale,
        params=dict(layer.extras) or None,
        heads=layer.heads,
        group=layer.cp_group,
        impl=layer.impl,
        rows=size.rows,
        capacity=size.capacity,
        device_blocks=size.device_blocks,
    )
