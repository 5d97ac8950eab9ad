"""Estimate the memory of weights, gradients and optimizer states."""

from dataclasses import dataclass

from lcdist.plan.estimate import Estimate
from lcdist.plan.zero import FP32_BYTES, ZeroStates


@dataclass(frozen=True)
class StateEstimate(Estimate):
    """Bytes that do not depend on the length of samples."""

    @property
    def state_bytes(self) -> int:
        """Weights, fp32 gradients and this rank's part of AdamW's fp32 state, on the fullest rank.

        The optimizer distributes whole tensors. Its part is taken as an even share, or as the
        largest tensor where that is more; the fullest rank holds at most both together. DeepSpeed
        divides states and, by stage, gradients and weights evenly, and has buffers besides.
        """
        if self.zero is not None:
            return self.zero.backward_bytes
        parallel, counts = self.shape.config.parallel, self.parameters
        even_share = -(-max(counts.trained_stages) // (self.shape.dp_size * parallel.cp_size))
        optimizer_elements = max(even_share, counts.largest_trained)
        weights_and_gradients = max(
            weights * self.shape.itemsize + gradients * FP32_BYTES
            for weights, gradients in zip(counts.stages, counts.trained_stages, strict=True)
        )
        return weights_and_gradients + optimizer_elements * self._optimizer_bytes

    @property
    def zero(self) -> ZeroStates | None:
        """The DeepSpeed engine's estimate; None under the Megatron engine."""
        is_chosen = self.shape.config.train.engine == "deepspeed"
        return ZeroStates(self.shape, self.parameters) if is_chosen else None

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint, files of all ranks together: weights and AdamW's state."""
        states = self.parameters.trained * self._optimizer_bytes
        return self.parameters.total * self.shape.itemsize + states

    @property
    def _optimizer_bytes(self) -> int:
        """AdamW's bytes a parameter: two moments, and a master weight beside bf16 weights."""
        master = FP32_BYTES if self.shape.itemsize < FP32_BYTES else 0
        return 2 * FP32_BYTES + master
