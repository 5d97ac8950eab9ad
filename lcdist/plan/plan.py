"""Plan a run: every number that follows from configuration, world size and hardware.

All contradictions are collected and raised together, before any process group or file is made.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from lcdist.config import ConfigError
from lcdist.config.fields import RANKS
from lcdist.config.schema import Config
from lcdist.config.values import shown
from lcdist.hardware.device import this_machine
from lcdist.hardware.gpu_specs import Hardware
from lcdist.layout import ContextLayout
from lcdist.plan.checks import (
    check_batch,
    check_layers,
    check_lora,
    check_loss,
    check_memory,
    check_methods,
    check_model,
    check_rope,
    check_schedule,
)
from lcdist.plan.compute import ComputeEstimate
from lcdist.plan.deepspeed import check_deepspeed, run_settings
from lcdist.plan.memory import MemoryEstimate
from lcdist.plan.parameters import ParameterCounts
from lcdist.plan.profile import check_profile
from lcdist.plan.resolve import LayerAttention, resolve_layers, resolve_layout
from lcdist.plan.shape import RunShape
from lcdist.plan.traffic import TrafficEstimate


@dataclass(frozen=True)
class Plan:
    """A run on a mesh: resolved choices, and estimates of memory, compute and traffic.

    Attributes:
        config: As given.
        world_size: Ranks of the run.
        dp_size: Data-parallel ranks: the world over the mesh's other sizes.
        layers: Attention of every layer.
        layout: How a sample, padded, is cut over context-parallel ranks.
        dtype: Of the weights, "fp32" or "bf16".
        hardware: The device of each rank.
        may_offload: Whether `train.offload = "auto"` may use the host's memory.
    """

    config: Config
    world_size: int
    dp_size: int
    layers: tuple[LayerAttention, ...]
    layout: ContextLayout
    dtype: str
    hardware: Hardware
    may_offload: bool

    def with_device_memory(self, memory_bytes: int) -> "Plan":
        """Return the plan for devices of so many bytes.

        Ranks that saved memory in different ways would wait for each other for ever.
        """
        return replace(self, hardware=replace(self.hardware, memory_bytes=memory_bytes))

    @cached_property
    def shape(self) -> RunShape:
        """Sizes that follow from configuration and mesh: heads, vocabulary, stages."""
        return RunShape(self.config, self.dp_size, self.layers, self.layout, self.dtype)

    @cached_property
    def parameters(self) -> ParameterCounts:
        """Numbers of parameters."""
        return ParameterCounts(self.shape)

    @cached_property
    def memory(self) -> MemoryEstimate:
        """Bytes per rank, and the choices that save memory."""
        # Ranks on a CPU share the memory of their host.
        own = None if self.hardware.kind == "cpu" else self.hardware.memory_bytes
        return MemoryEstimate(self.shape, self.parameters, self.may_offload, own)

    @cached_property
    def compute(self) -> ComputeEstimate:
        """Floating-point operations a token."""
        return ComputeEstimate(self.shape, self.parameters)

    @cached_property
    def traffic(self) -> TrafficEstimate:
        """Bytes that attention sends."""
        return TrafficEstimate(self.shape, self.memory.forward_passes)


def make_plan(config: Config, world_size: int, hardware: Hardware | None = None) -> Plan:
    """Resolve `config` on `world_size` ranks.

    Args:
        config: The configuration of the run.
        world_size: Number of ranks.
        hardware: The device of each rank; None: the device of this machine.

    Raises:
        ConfigError: With every contradiction in the configuration.
    """
    errors: list[str] = []
    dp_size = _data_parallel_size(config, world_size, errors)
    check_model(config, errors)
    check_batch(config, dp_size, errors)
    check_rope(config, errors)
    check_loss(config, errors)
    check_memory(config, errors)
    check_lora(config, errors)
    check_schedule(config, errors)
    check_profile(config, world_size, errors)
    hardware = hardware or this_machine()
    on_gpu = hardware.kind == "cuda"
    dtype = config.train.dtype
    if dtype == "auto":
        dtype = "bf16" if on_gpu else "fp32"
    check_deepspeed(config, dtype, errors)
    layers = resolve_layers(config, errors)
    check_methods(config, layers, errors)
    layout = resolve_layout(config, layers, errors) if layers else None
    if layout is not None:
        check_layers(config, layers, layout, errors)
    if errors or layout is None:
        raise ConfigError(errors)
    plan = Plan(config, world_size, dp_size, layers, layout, dtype, hardware, may_offload=on_gpu)
    if config.train.engine == "deepspeed":
        run_settings(plan.shape, errors)
    if errors:
        raise ConfigError(errors)
    return plan


def smallest_world(config: Config) -> int:
    """Return the fewest ranks that the mesh of `config` can run on."""
    parallel = config.parallel
    return parallel.tp_size * parallel.pp_size * parallel.cp_size


def _data_parallel_size(config: Config, world_size: int, errors: list[str]) -> int:
    mesh = smallest_world(config)
    if world_size > RANKS.most:
        errors.append(f"world size {shown(world_size)}: at most {RANKS.most:,} ranks are legal")
        return 1
    if world_size < 1 or world_size % mesh:
        sizes = config.parallel
        errors.append(
            f"world size {world_size} is not a multiple of parallel.tp_size x pp_size x cp_size = "
            f"{sizes.tp_size} x {sizes.pp_size} x {sizes.cp_size} = {mesh}; "
            f"start {mesh} processes or a multiple (launch/run.py --nproc-per-node)"
        )
        return 1
    return world_size // mesh
