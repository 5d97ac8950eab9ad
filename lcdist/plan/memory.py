"""Estimate memory per rank, and choose recomputation, offload and chunk sizes."""

from dataclasses import dataclass, replace
from functools import cached_property

from lcdist.plan.activations import ActivationEstimate
from lcdist.plan.rungs import Mix, Rung, allowed_rungs, cheaper_for_a_layer, rung_by_tokens
from lcdist.plan.zero import pinned_bytes

# Of the device's memory. Not counted: temporary memory of backward, buffers of communication and
# fragments.
USABLE_SHARE = 0.92


@dataclass(frozen=True)
class MemoryEstimate(ActivationEstimate):
    """Bytes per rank: weights, gradients, optimizer states and activations.

    Attributes:
        may_offload: Whether `train.offload = "auto"` may use the host's memory.
        device_memory: Bytes of the rank's device; None where ranks share it, as on a CPU.
        given: The way to save memory, whatever fits; None: `rung` and `mix` choose.
        given_mix: `mix`, beside a given rung.
    """

    may_offload: bool
    device_memory: int | None = None
    given: Rung | None = None
    given_mix: Mix | None = None

    @property
    def device_bytes(self) -> int:
        """Weights, states and activations on the fullest rank."""
        in_backward = self.state_bytes + self.activation_bytes
        return in_backward if self.zero is None else max(in_backward, self.zero.step_bytes)

    # --- choices ----------------------------------------------------------------------------------

    @cached_property
    def rung(self) -> Rung:
        """The way to save memory: the cheapest that fits the device, else the smallest.

        Where the device's memory is unknown, the number of tokens decides.
        """
        if self.given is not None:
            return self.given
        needed = self.needed_bytes
        if not needed:
            train, tokens = self.shape.config.train, self.shape.local_tokens
            return rung_by_tokens(train, tokens, self.may_offload)
        fitting = (rung for rung, count in needed.items() if count <= self.usable_bytes)
        return next(fitting, min(needed, key=lambda rung: needed[rung]))

    @cached_property
    def mix(self) -> Mix | None:
        """The layers that take a cheaper rung, since the device has room for it; None: no layer.

        The gradients of a layer's activations, which are not counted, are left as much room as
        these activations.
        """
        if self.given is not None:
            return self.given_mix
        rung, needed, room = self.rung, self.needed_bytes, self.usable_bytes
        cheaper = cheaper_for_a_layer(rung, [*needed]) if needed else None
        if cheaper is None or needed[rung] > room:
            return None
        heavy, light = (replace(self, given=each) for each in (rung, cheaper))
        more = max(self._chunks_in_flight) * (light.layer_bytes - heavy.layer_bytes)
        room -= light.saved_bytes(selective=False)
        count = self.shape.chunk_layers
        if more > 0:
            count = max(0, min(count, (room - needed[rung]) // more))
        while count and self._with_mix(rung, Mix(cheaper, count)).device_bytes > room:
            count -= 1
        return Mix(cheaper, count) if count else None

    def _with_mix(self, rung: Rung, mix: Mix) -> "MemoryEstimate":
        return replace(self, given=rung, given_mix=mix)

    @cached_property
    def cheaper(self) -> "MemoryEstimate | None":
        """The estimate of layers with the rung of `mix`; None without such layers."""
        return replace(self, given=self.mix.rung, given_mix=None) if self.mix else None

    @property
    def layer_parts(self) -> "list[tuple[MemoryEstimate, int]]":
        """Estimates of a chunk's layers and how many these are, in the layers' order."""
        if self.mix is None or self.cheaper is None:
            return [(self, self.shape.chunk_layers)]
        parts = [(self, self.shape.chunk_layers - self.mix.layers), (self.cheaper, self.mix.layers)]
        return [(part, count) for part, count in parts if count]

    @property
    def forward_passes(self) -> float:
        """Forward passes of a layer's attention in a step, on average."""
        again = sum(count for part, count in self.layer_parts if part.recompute == "full")
        return 1 + again / self.shape.chunk_layers

    @cached_property
    def needed_bytes(self) -> dict[Rung, int]:
        """`device_bytes` if all layers have one rung, by rung that is allowed, the cheapest first.

        Empty where the device's memory is unknown.
        """
        if self.device_memory is None:
            return {}
        rungs = allowed_rungs(self.shape.config.train, self.may_offload)
        return {rung: replace(self, given=rung).device_bytes for rung in rungs}

    @property
    def usable_bytes(self) -> int:
        """Memory of the device that a plan may fill; the rest is for what it does not count."""
        return int((self.device_memory or 0) * USABLE_SHARE)

    # --- activations ------------------------------------------------------------------------------

    @property
    def activation_bytes(self) -> int:
        """Activations saved for backward on the fullest rank, and the loss's and MLP's buffers.

        Counted tensor by tensor for full attention on a CPU: within 2 % of what autograd saves
        there, on meshes without pipelining. `attention.impl = "reference"` saves dense scores on
        top; frozen weights save less. Temporary memory of backward is left out, except for the one
        layer that full recompute computes again, and a tile of the MLP.
        """
        layers, recomputed = self.shape.chunk_layers * self.layer_bytes, self.recompute_bytes
        if self.mix is not None and self.cheaper is not None:
            layers += self.mix.layers * (self.cheaper.layer_bytes - self.layer_bytes)
            recomputed = max(recomputed, self.cheaper.recompute_bytes)
        first, last = (layers * chunks for chunks in self._chunks_in_flight)
        saved_by_loss, loss_buffers = self.loss_bytes
        # The loss has finished when the first layer is recomputed.
        last += 2 * self._hidden_bytes + saved_by_loss + max(recomputed, loss_buffers)
        return max(first + recomputed, last)

    @property
    def host_bytes(self) -> int:
        """Host memory that one rank fills with what is offloaded: of layers and of states."""
        return self.offloaded_bytes + (0 if self.zero is None else self.zero.host_bytes)

    @property
    def offloaded_bytes(self) -> int:
        """Host memory that one rank fills with what is saved of layers; 0 without offload."""
        if not self.offloads:
            return 0
        buffers = pinned_bytes(self._hidden_bytes)
        if self.recompute == "keep_attention":
            width = self.shape.config.model.nheads // self._tp_size * self.shape.head_dim
            out = self.shape.local_tokens * width * self.shape.itemsize
            buffers += pinned_bytes(out) + pinned_bytes(self._kept_bytes - out)
        layers = sum(count for part, count in self.layer_parts if part.offloads)
        return layers * max(self._chunks_in_flight) * buffers
