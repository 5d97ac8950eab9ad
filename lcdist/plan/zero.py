"""Estimate what the DeepSpeed engine holds of weights, gradients and optimizer states.

Read from DeepSpeed 0.19.8: `runtime/bf16_optimizer.py`, `runtime/zero/stage_1_and_2.py`,
`runtime/zero/stage3.py`. Padding, about 100 elements a parameter, is left out.
"""

from dataclasses import dataclass

from lcdist.config.deepspeed import DeepSpeedConfig
from lcdist.config.lora_sizes import adapter_tensors
from lcdist.plan.deepspeed import disk_buffer_elements
from lcdist.plan.estimate import Estimate

FP32_BYTES = 4
MOMENT_BYTES = 2 * FP32_BYTES
# Elements that the engine reduces at once without a partition of gradients: a constant of its.
REDUCED_AT_ONCE = 500_000_000
# Defaults of ZeRO-3: tensors up to this size stay whole; states are updated in groups of this size.
PERSISTENT_ELEMENTS = 100_000
SUB_GROUP_ELEMENTS = 1_000_000_000
# Elements that ZeRO-3 keeps whole around the end of forward, since backward needs them again: half
# of `stage3_max_reuse_distance`, which counts the way there and back.
REUSED_ELEMENTS = 500_000_000
# Pinned buffers of offload to a disk: of a sub-group's states, and of parameters.
STATE_BUFFERS, PARAMETER_BUFFERS = 4, 5


@dataclass(frozen=True)
class ZeroStates(Estimate):
    """Bytes of a rank under the DeepSpeed engine."""

    @property
    def backward_bytes(self) -> int:
        """Most bytes on the device beside activations."""
        if self._stage == 3:
            return self.at_rest + self._gradients + self._gathered
        largest = self.parameters.largest_trained * self.shape.itemsize
        # A gradient before it is copied, and a copy of the bucket while it is reduced.
        moving = largest + max(self._bucket * self.shape.itemsize, largest)
        if self._keeps_all_gradients:
            moving = largest
        return self.at_rest + self._gradients + self._buckets + moving

    @property
    def step_bytes(self) -> int:
        """Most bytes on the device after backward, when activations are gone."""
        if self._stage == 0:
            # Squares for the norm are float64.
            return self.at_rest + self._gradients + max(self._reduced, 16 * self._largest)
        if self._keeps_all_gradients:
            return self.at_rest + self._gradients + self._reduced
        if self._offloads:
            return self.at_rest
        copied = min(self._part, SUB_GROUP_ELEMENTS) * FP32_BYTES
        if self._stage == 2 and self.shape.itemsize < FP32_BYTES:
            # The flat fp32 gradient is the copy.
            copied = 0
        # ZeRO-3 has the buffer of its part's gradients at all times.
        gradients = self._part * FP32_BYTES if self._stage < 3 else 0
        return self.at_rest + gradients + copied

    @property
    def host_bytes(self) -> int:
        """Most bytes of the host's memory, with a checkpoint's copy of the states.

        0 without offload: then a checkpoint is copied as under the Megatron engine.
        """
        if not self.offloaded_bytes:
            return 0
        ranks, itemsize = self._ranks, self.shape.itemsize
        weights = self.parameters.stages[0] // ranks * itemsize if self._stage == 3 else 0
        master = FP32_BYTES if itemsize < FP32_BYTES else 0
        return self.offloaded_bytes + self._part * (MOMENT_BYTES + master) + weights

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of the host's memory between checkpoints."""
        settings, part, itemsize = self._settings, self._part, self.shape.itemsize
        kept = self._offloaded_parameters
        states = settings.offload_optimizer
        if states == "nvme":
            buffer = min(part, SUB_GROUP_ELEMENTS) * FP32_BYTES
            kept += pinned_bytes(part * FP32_BYTES) + STATE_BUFFERS * pinned_bytes(buffer)
        elif states == "cpu" and self._stage == 3:
            # Gradients twice: as they arrive, and as the optimizer reads them.
            kept += part * (FP32_BYTES + MOMENT_BYTES) + 2 * pinned_bytes(part * FP32_BYTES)
        elif states == "cpu":
            kept += part * MOMENT_BYTES + 2 * pinned_bytes(part * FP32_BYTES)
            kept += pinned_bytes(part * itemsize) + pinned_bytes(self._largest * itemsize)
            if self.shape.num_micro_batches > 1:
                kept += part * itemsize
        return kept

    # --- parts ------------------------------------------------------------------------------------

    @property
    def at_rest(self) -> int:
        """Bytes on the device between steps, without what ZeRO-3 gathers for a layer."""
        weights, itemsize = self.parameters.stages[0], self.shape.itemsize
        if self._stage == 0:
            return weights * itemsize + self._trained * MOMENT_BYTES
        states = 0 if self._offloads else self._part * (FP32_BYTES + MOMENT_BYTES)
        if self._stage < 3:
            # Where gradients are summed in fp32 for all, their buffer is never freed.
            kept = self._trained * FP32_BYTES if self._keeps_all_gradients else 0
            buffer = self._largest * itemsize if self._offloads else 0
            return weights * itemsize + states + kept + buffer
        shared = 0 if self._settings.offload_parameters != "none" else -(-weights // self._ranks)
        gradients = 0 if self._offloads else self._part * FP32_BYTES
        bucket = self._settings.reduce_bucket_elements
        persistent = sum(n for n in self._tensors if n <= PERSISTENT_ELEMENTS)
        return (shared + persistent + bucket) * itemsize + states + gradients

    @property
    def _gradients(self) -> int:
        """Gradients on the device that `at_rest` has not, at the end of backward."""
        if self._stage == 0:
            return self._trained * FP32_BYTES
        if self._keeps_all_gradients:
            return self._trained * self.shape.itemsize
        if self._stage == 3:
            return 0
        waits = self._stage == 1 and not self._settings.overlap
        whole = self._trained * FP32_BYTES if waits else 0
        if self._offloads:
            # In fp32 for a moment, to be copied to the host.
            return whole or self._largest * FP32_BYTES
        part = self._part * FP32_BYTES
        # fp32 weights: the sum of earlier micro-batches, and this one's.
        sums = self.shape.num_micro_batches > 1 and self.shape.itemsize == FP32_BYTES
        return max(whole, part) + (part if sums else 0)

    @property
    def _gathered(self) -> int:
        """Return bytes of gathered and prefetched weights and of gradients early in backward."""
        layer, table = self._layer_and_table
        current, weights = max(layer, table), self.parameters.stages[0]
        gathered = REUSED_ELEMENTS + current
        gathered += self._settings.gather_bucket_elements + self._largest
        gradients = min(current, self._trained)
        return (min(gathered, weights) + gradients + self._bucket) * self.shape.itemsize

    @property
    def _layer_and_table(self) -> tuple[int, int]:
        """Elements of a layer and of a table of the vocabulary on a rank, persistent ones apart."""
        model, tp_size = self.shape.config.model, self.shape.config.parallel.tp_size
        layer = sum(n for n in self._layer_tensors(0) if n > PERSISTENT_ELEMENTS)
        return layer, self.shape.padded_vocab_size // tp_size * model.hidden_size

    @property
    def _tensors(self) -> list[int]:
        """Elements of every tensor of the rank, tables of the vocabulary apart."""
        model = self.shape.config.model
        layers = (n for layer in range(model.num_layers) for n in self._layer_tensors(layer))
        return [model.hidden_size, *layers]

    def _layer_tensors(self, layer: int) -> list[int]:
        config, head_dim = self.shape.config, self.shape.head_dim
        model, tp_size = config.model, config.parallel.tp_size
        attention, keys = model.nheads * head_dim, 2 * self.shape.nheads_kv * head_dim
        rows = [attention + keys, attention, 2 * model.ffn_hidden_size, model.ffn_hidden_size]
        return [
            *(model.hidden_size * count // tp_size for count in rows),
            *(model.hidden_size, model.hidden_size, self.parameters.layer_biases // tp_size),
            *(2 * [head_dim] if model.qk_norm else []),
            *adapter_tensors(config, tp_size).values(),
            self.parameters.layer_extras(layer) // tp_size,
        ]

    @property
    def _buckets(self) -> int:
        """The buffers that gradients are reduced in: ZeRO-1 and 2."""
        if self._stage == 0 or self._keeps_all_gradients:
            return 0
        itemsize = FP32_BYTES if self._stage == 1 else self.shape.itemsize
        return (1 + self._settings.overlap) * self._settings.reduce_bucket_elements * itemsize

    @property
    def _bucket(self) -> int:
        return min(self._settings.reduce_bucket_elements, self._trained)

    @property
    def _reduced(self) -> int:
        """Copies of all gradients while they are reduced, in fp32 and in the weights' dtype."""
        itemsize = self.shape.itemsize
        copies = FP32_BYTES + (itemsize if itemsize < FP32_BYTES else 0)
        return min(self._trained, REDUCED_AT_ONCE + self._largest) * copies

    @property
    def _offloaded_parameters(self) -> int:
        """Bytes of weights in the host's memory."""
        itemsize, target = self.shape.itemsize, self._settings.offload_parameters
        weights = -(-self.parameters.stages[0] // self._ranks)
        if target == "nvme":
            weights = min(weights, SUB_GROUP_ELEMENTS)
            buffers = PARAMETER_BUFFERS * pinned_bytes(disk_buffer_elements(self.shape) * itemsize)
            return pinned_bytes(weights * itemsize) + buffers
        return pinned_bytes(weights * itemsize) if target == "cpu" else 0

    @property
    def _keeps_all_gradients(self) -> bool:
        """Return whether BF16_Optimizer runs, which keeps every gradient in fp32 on every rank."""
        is_short = self.shape.itemsize < FP32_BYTES
        return self._stage == 1 and is_short and not self._offloads

    @property
    def _offloads(self) -> bool:
        return self._settings.offload_optimizer != "none"

    @property
    def _settings(self) -> DeepSpeedConfig:
        return self.shape.config.deepspeed

    @property
    def _stage(self) -> int:
        return self._settings.stage

    @property
    def _ranks(self) -> int:
        """Ranks that share the states."""
        return self.shape.dp_size * self.shape.config.parallel.cp_size

    @property
    def _trained(self) -> int:
        return self.parameters.trained_stages[0]

    @property
    def _part(self) -> int:
        """Trained elements whose state this rank has."""
        return -(-self._trained // self._ranks)

    @property
    def _largest(self) -> int:
        return self.parameters.largest_trained


def pinned_bytes(count: int) -> int:
    """Return what `count` bytes of one tensor take: torch rounds pinned memory to powers of two."""
    return 1 << (count - 1).bit_length() if count else 0
