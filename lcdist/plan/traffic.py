"""Count the bytes that attention sends between context-parallel ranks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lcdist.plan.resolve import LayerAttention
from lcdist.plan.shape import RunShape


@dataclass(frozen=True)
class TrafficEstimate:
    """Bytes sent for attention.

    Attributes:
        shape: The run.
        forward_passes: How often a step runs a layer's forward pass, on average: 2 with full
            recompute of all layers.
    """

    shape: RunShape
    forward_passes: float

    @property
    def exchange_bytes(self) -> tuple[int, int]:
        """Most bytes a rank sends in one layer for a micro-batch: (forward, backward)."""
        ranks = [sent for ranks in self._sent_bytes.values() for sent in ranks] or [(0, 0)]
        return max(forward for forward, _ in ranks), max(backward for _, backward in ranks)

    @property
    def exchange_bytes_per_step(self) -> int:
        """Bytes the busiest rank sends for attention in one step, recomputation included."""
        if not self._sent_bytes:
            return 0
        sums = []
        for stage in self.shape.stage_layers:
            kinds = Counter(self.shape.layers[number] for number in stage)
            ranks = zip(*(self._sent_bytes[kind] for kind in kinds), strict=True)
            sums += [self._sum_of_kinds(list(kinds.values()), rank) for rank in ranks]
        return round(self.shape.num_micro_batches * max(sums))

    def _sum_of_kinds(self, counts: Sequence[int], sent: Sequence[tuple[int, int]]) -> float:
        """Return the bytes that a rank sends for so many layers of each kind."""
        pairs = zip(counts, sent, strict=True)
        return sum(n * (self.forward_passes * ahead + back) for n, (ahead, back) in pairs)

    @property
    def exchanges(self) -> tuple[str, ...]:
        """Kinds of exchange between context-parallel ranks; empty for one rank."""
        layers = dict.fromkeys(self.shape.layers)
        used = [layer.method.exchange_for(layer.options) for layer in layers]
        if self.shape.config.parallel.cp_size == 1:
            return ()
        return tuple(dict.fromkeys(exchange for exchanges in used for exchange in exchanges))

    @cached_property
    def _sent_bytes(self) -> dict[LayerAttention, list[tuple[int, int]]]:
        """(forward, backward) bytes that each (tp, cp) rank sends, by the kind of layer.

        For one layer and one micro-batch; empty without context parallelism.
        """
        shape, config = self.shape, self.shape.config
        if config.parallel.cp_size == 1:
            return {}
        batch, tp_ranks = config.train.micro_batch_size, range(config.parallel.tp_size)
        shapes = [shape.attention_shape(batch, tp_rank) for tp_rank in tp_ranks]
        return {
            layer: [
                sent
                for one in shapes
                for sent in zip(*layer.method.bytes(layer.options, one, shape.layout), strict=True)
            ]
            for layer in dict.fromkeys(shape.layers)
        }
