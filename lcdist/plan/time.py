"""Estimate the time of a training step: the plan's operations and bytes over measured rates."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lcdist.attention import METHODS, Shape
from lcdist.plan.plan import Plan
from lcdist.plan.resolve import LayerAttention
from lcdist.plan.rungs import SAVES_INPUTS

# A backward pass of attention, in forward passes: it makes the scores again.
ATTENTION_BACKWARD = 2.5
# Passes over what layers and loss keep for backward, and bytes an update moves for each trained
# parameter: both counted in the profile that `measured.py` names, at 3.0 TB/s.
PASSES_OVER_KEPT = 17
UPDATE_BYTES = 86
# Options that choose another computation, not another size.
FORM_OPTIONS = ("pattern", "reweight", "top_k")
# Narrower heads than these are slower, by `Rates.narrow`.
MEASURED_HEAD_DIM = 128


@dataclass(frozen=True)
class AttentionRow:
    """Time of one layer's attention over 32,768 tokens, 32 query heads and 8 of keys, each of 128.

    Attributes:
        method: The method's name.
        options: Those that the row was measured with.
        forward, backward: Milliseconds.
    """

    method: str
    options: Mapping[str, Any]
    forward: float
    backward: float

    @property
    def rates(self) -> tuple[float, float]:
        """FLOP/s of (forward, backward), over the operations that the plan counts."""
        method = METHODS[self.method]
        shape = Shape(1, 32, 8, MEASURED_HEAD_DIM, itemsize=2, seqlen=32_768)
        flops = method.flops(method.options(**self.options), shape)
        return 1e3 * flops / self.forward, 1e3 * ATTENTION_BACKWARD * flops / self.backward

    def fits(self, layer: LayerAttention) -> bool:
        """Return whether the row is of this layer's method, in the same form."""
        method = METHODS[self.method]
        if layer.method.name != self.method:
            return False
        mine = method.options(**self.options)
        return all(
            getattr(mine, key, None) == getattr(layer.options, key, None) for key in FORM_OPTIONS
        )


@dataclass(frozen=True)
class Rates:
    """Hold the rates measured on one device.

    Attributes:
        products: FLOP/s of products with weights.
        attention: Rows of attention methods.
        narrow: Share of attention's rate that heads of 64 reach.
        moved: Bytes a second that are read and written outside of both.
    """

    products: float
    attention: tuple[AttentionRow, ...]
    narrow: float
    moved: float


@dataclass(frozen=True)
class StepWork:
    """Count the work of all ranks together in one step.

    Attributes:
        products: Operations of products with weights, recomputation included.
        attention: (forward, backward) operations, by the kind of layer.
        moved: Bytes that are read and written outside of both.
    """

    products: float
    attention: Mapping[LayerAttention, tuple[float, float]]
    moved: float

    @property
    def flops(self) -> float:
        """All operations."""
        return self.products + sum(map(sum, self.attention.values()))


def step_work(plan: Plan) -> StepWork:
    """Count what a training step does, recomputation included."""
    shape, memory, compute = plan.shape, plan.memory, plan.compute
    model, batch = plan.config.model, plan.config.train.global_batch_size
    whole = compute.product_flops_per_token
    output = 2 * shape.padded_vocab_size * model.hidden_size
    lora = plan.config.lora
    fc2 = 2 * model.num_layers * model.hidden_size * model.ffn_hidden_size
    # The last product of a layer is made again for its adapter alone.
    layers = whole - output - (0 if lora.rank and "down" in lora.targets else fc2)
    again = float(output if memory.rung.chunked else 0)
    moved = float(UPDATE_BYTES * plan.parameters.trained)
    for part, count in memory.layer_parts:
        share, runs_again = count / shape.chunk_layers, part.recompute in SAVES_INPUTS
        again += share * (layers if runs_again else 2 * fc2 if part.rung.tiled else 0)
        kept = model.num_layers * part.saved_bytes(selective=False) // plan.config.parallel.pp_size
        kept += memory.whole_logits_bytes
        # A layer that is run again adds a forward to a forward and a backward of twice its length.
        passes = PASSES_OVER_KEPT * (4 / 3 if runs_again else 1)
        moved += share * passes * kept * shape.num_micro_batches * plan.world_size
    once = 3 * whole - compute.frozen_flops_per_token
    sample = shape.attention_shape(batch=1)
    attention = {
        layer: (memory.forward_passes * flops, ATTENTION_BACKWARD * flops)
        for layer, count in Counter(shape.layers).items()
        for flops in [batch * count * layer.method.flops(layer.options, sample)]
    }
    return StepWork((once + again) * batch * shape.seqlen, attention, moved)


def step_seconds(plan: Plan, rates: Rates) -> float | None:
    """Estimate the seconds of a training step on devices with these rates.

    Several devices share the work evenly, and what they send each other takes no time.

    Returns:
        None where a method was not measured.
    """
    work = step_work(plan)
    narrow = rates.narrow if plan.shape.head_dim < MEASURED_HEAD_DIM else 1.0
    seconds = work.products / rates.products + work.moved / rates.moved
    for layer, (forward, backward) in work.attention.items():
        row = next((row for row in rates.attention if row.fits(layer)), None)
        if row is None:
            return None
        seconds += (forward / row.rates[0] + backward / row.rates[1]) / narrow
    return seconds / plan.world_size
