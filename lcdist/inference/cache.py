"""KV cache for decoding token by token."""

from torch import Tensor


class KVCache:
    """Keys and values without rotation, by layer number; each step appends to them.

    A layer's buffers are allocated at its first append, with the dtype and device of its keys.

    max_seqlen: capacity in tokens.
    """

    def __init__(self, max_seqlen: int) -> None:
        self.max_seqlen = max_seqlen
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._lengths: dict[int, int] = {}
        self._states: dict[int, dict[str, Tensor]] = {}

    def state(self, layer_number: int) -> dict[str, Tensor]:
        """Return further state of the layer's method: a dict, empty at first, that it may fill."""
        return self._states.setdefault(layer_number, {})

    def append(self, layer_number: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v `[b, s, nheads_kv, head_dim]`; return all keys and values of the layer.

        Raises ValueError if max_seqlen is exceeded.
        """
        length = self._lengths.get(layer_number, 0)
        end = length + k.shape[1]
        if end > self.max_seqlen:
            raise ValueError(f"{end} tokens do not fit a cache of max_seqlen = {self.max_seqlen}")
        if layer_number not in self._buffers:
            shape = (k.shape[0], self.max_seqlen, *k.shape[2:])
            self._buffers[layer_number] = (k.new_zeros(shape), v.new_zeros(shape))
        for buffer, new in zip(self._buffers[layer_number], (k, v), strict=True):
            buffer[:, length:end] = new
        self._lengths[layer_number] = end
        keys, values = self._buffers[layer_number]
        return keys[:, :end], values[:, :end]
