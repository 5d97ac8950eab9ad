"""Look one layer ahead: bring what the next layer will read to the device while this one runs.

The input of a layer differs little from that of the next one, so the next layer's norm and
projection of this layer's input say about which blocks its queries will choose (after InfiniGen,
arXiv:2406.19707). It costs one projection more a layer. A wrong guess costs a copy, and never
changes a result.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lcdist.inference.cache import ModelCache


@contextlib.contextmanager
def looking_ahead(layers: Sequence[Any], cache: ModelCache) -> Iterator[None]:
    """Let each layer tell the cache what the next layer will read, where the cache asks for it.

    Args:
        layers: Megatron's layers of this rank, in their order.
        cache: of the same layers.
    """
    asked = [
        (layer, partial(_expect, following, cache))
        for layer, following in zip(layers, layers[1:], strict=False)
        if cache.new.count == 1 and cache.looks_ahead(following.layer_number)
    ]
    hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer, hook in asked]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _expect(
    following: Any, cache: ModelCache, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    queries = following.self_attention.queries(following.input_layernorm(hidden))
    cache.expect(following.layer_number, queries)
