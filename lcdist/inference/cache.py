"""Keys and values of the tokens read so far, one store a layer, for decoding token by token."""

from torch import Tensor


class KVCache:
    """Un-rotated keys and values by layer number; grows by what each step appends.

    max_seqlen: tokens there is room for. The store of a layer is made at its first append, in the
    dtype and on the device of what arrives.
    """

    def __init__(self, max_seqlen: int) -> None:
        self.max_seqlen = max_seqlen
        self._stores: dict[int, tuple[Tensor, Tensor]] = {}
        self._lengths: dict[int, int] = {}
        self._states: dict[int, dict[str, Tensor]] = {}

    def state(self, layer_number: int) -> dict[str, Tensor]:
        """What else the layer's method keeps of the past: empty at first, the method's to fill."""
        return self._states.setdefault(layer_number, {})

    def append(self, layer_number: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k and v `[b, s, nheads_kv, head_dim]`; returns all of the layer's so far.

        Raises ValueError where there is no room.
        """
        length = self._lengths.get(layer_number, 0)
        end = length + k.shape[1]
        if end > self.max_seqlen:
            raise ValueError(f"{end} tokens do not fit a cache of max_seqlen = {self.max_seqlen}")
        if layer_number not in self._stores:
            shape = (k.shape[0], self.max_seqlen, *k.shape[2:])
            self._stores[layer_number] = (k.new_zeros(shape), v.new_zeros(shape))
        for store, new in zip(self._stores[layer_number], (k, v), strict=True):
            store[:, length:end] = new
        self._lengths[layer_number] = end
        keys, values = self._stores[layer_number]
        return keys[:, :end], values[:, :end]
