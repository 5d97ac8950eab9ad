"""Collectives of a layer and of the loss in a training step: as few as Megatron's, or fewer."""

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
SEQUENCE_PARALLEL = ("parallel.tp_size=2", "parallel.sequence_parallel=true")
# Of a micro-batch, forward and backward together.
EXPECTED: dict[tuple[str, ...], dict[str, float]] = {
    # A sum behind attention and behind the MLP, and of the gradients of what went in.
    ("parallel.tp_size=2",): {"allreduce_": 4},
    # The same in halves, and inputs are gathered again for the weights' gradients.
    SEQUENCE_PARALLEL: {"_allgather_base_": 6, "_reduce_scatter_base_": 4},
    # The second run gathers twice and scatters once: it does not need the layer's output.
    (*SEQUENCE_PARALLEL, "train.recompute=full"): {
        "_allgather_base_": 8,
        "_reduce_scatter_base_": 5,
    },
    # A ring of two: its hops of keys and values, and of their gradients.
    ("parallel.cp_size=2",): {"send": 4, "recv_": 4},
    # Gradients are reduced by buckets, not by layers.
    ("train.global_batch_size=2",): {},
}


def of_a_step(meshes: Meshes, *words: str) -> Counter[str]:
    """Return the collectives of a step."""
    trainer = meshes.trainer(small(ONE, *words))
    # The first step makes buffers.
    take_steps(trainer, 1)
    with Collectives() as collectives:
        take_steps(trainer, 1)
    return collectives.counts


def of_a_layer(rank: int, world_size: int) -> dict[tuple[str, ...], dict[str, float]]:
    """Return collectives of a layer: half of what two more layers add."""
    meshes, found = Meshes(), {}
    for words in EXPECTED:
        fewer, more = (of_a_step(meshes, *words, f"model.num_layers={n}") for n in (2, 4))
        found[words] = {name: count / 2 for name, count in (more - fewer).items()}
    return found


def test_a_layer_sends_what_megatrons_does() -> None:
    for found in run_ranks(of_a_layer, 2):
        assert found == EXPECTED


def of_a_chunk(rank: int, world_size: int) -> dict[str, float]:
    """Return collectives of a chunk of the loss: half of what two more chunks add."""
    meshes, words = Meshes(), (*SEQUENCE_PARALLEL, "train.seqlen=64", "train.loss=chunked")
    fewer, more = (of_a_step(meshes, *words, f"train.loss_chunk={n}") for n in (32, 16))
    return {name: count / 2 for name, count in (more - fewer).items()}


def test_a_chunk_of_the_loss_is_gathered_once_a_pass() -> None:
    """With the maxima and sums of all chunks, a loss of one chunk takes five collectives."""
    for found in run_ranks(of_a_chunk, 2):
        assert found == {"_allgather_base_": 2, "_reduce_scatter_base_": 1}
