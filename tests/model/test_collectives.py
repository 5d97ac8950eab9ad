"""Collectives of a layer in a training step: those of Megatron's layers and of the attention."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import run_ranks
from tests.model.small import Meshes, small, take_steps


class Collectives(TorchDispatchMode):
    """Counts what is sent, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation of torch.distributed and call it."""
        if func.namespace == "c10d":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


ONE = "train.global_batch_size=1"
# Of a micro-batch, forward and backward together.
EXPECTED: dict[tuple[str, ...], dict[str, float]] = {
    # A sum behind attention and behind the MLP, and of the gradients of what went in.
    ("parallel.tp_size=2",): {"allreduce_": 4},
    # The same in halves, and inputs are gathered again for the weights' gradients.
    ("parallel.tp_size=2", "parallel.sequence_parallel=true"): {
        "_allgather_base_": 6,
        "_reduce_scatter_base_": 4,
    },
    # A ring of two: its hops of keys and values, and of their gradients.
    ("parallel.cp_size=2",): {"send": 4, "recv_": 4},
    # Gradients are reduced by buckets, not by layers.
    ("train.global_batch_size=2",): {},
}


def of_a_layer(rank: int, world_size: int) -> dict[tuple[str, ...], dict[str, float]]:
    """Return collectives of a layer: half of what two more layers add."""
    meshes, found = Meshes(), {}
    for words in EXPECTED:
        counts = []
        for layers in (2, 4):
            trainer = meshes.trainer(small(ONE, *words, f"model.num_layers={layers}"))
            # The first step makes buffers.
            take_steps(trainer, 1)
            with Collectives() as collectives:
                take_steps(trainer, 1)
            counts.append(collectives.counts)
        more = counts[1] - counts[0]
        found[words] = {name: count / 2 for name, count in more.items()}
    return found


def test_a_layer_sends_what_megatrons_does() -> None:
    for found in run_ranks(of_a_layer, 2):
        assert found == EXPECTED
