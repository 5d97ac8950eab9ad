"""Start DeepSpeed on a mesh that Megatron has built."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lcdist.config import ConfigError
from lcdist.config.schema import OptimConfig
from lcdist.distributed.mesh import Mesh
from lcdist.engines.parameters import TrainedParameter
from lcdist.hardware.deepspeed_on_cpu import has_async_io, import_deepspeed
from lcdist.model.build import CausalLM
from lcdist.model.memory.layer import Layer
from lcdist.plan import Plan
from lcdist.plan.deepspeed import run_settings


class Groups:
    """The mesh as DeepSpeed asks for it; its data-parallel ranks are dp x cp, its model tp."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def get_model_parallel_rank(self) -> int:
        """Return this rank's number among the tensor-parallel ranks."""
        return self.mesh.tp_rank

    def get_model_parallel_world_size(self) -> int:
        """Return the number of tensor-parallel ranks."""
        return self.mesh.tp_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Return the tensor-parallel ranks."""
        return self.mesh.tp_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        """Return this rank's number among those that hold the same parameters."""
        return dist.get_rank(self.mesh.dp_cp_group)

    def get_data_parallel_world_size(self) -> int:
        """Return the number of ranks that hold the same parameters."""
        return self.mesh.dp_cp_group.size()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Return the ranks that hold the same parameters."""
        return self.mesh.dp_cp_group


def start(plan: Plan, mesh: Mesh, chunk: CausalLM, trained: Sequence[TrainedParameter]) -> Any:
    """Return DeepSpeed's engine over a model chunk, with the state of AdamW at zero.

    Raises ConfigError if the user's file contradicts the run, or an operation cannot be built.
    """
    errors: list[str] = []
    # The plan has read the same file; on this host it may be another.
    config = run_settings(plan.shape, errors)
    if errors:
        raise ConfigError(errors)
    deepspeed = import_deepspeed()
    settings = plan.config.deepspeed
    if "nvme" in (settings.offload_optimizer, settings.offload_parameters):
        _check_async_io()
    _mark_replicated(chunk, mesh)
    if settings.stage == 3:
        # A layer's weights are gathered at once, so that its second forward pass, tiles of its MLP
        # and its backward find them.
        deepspeed.utils.set_z3_leaf_modules(chunk, [Layer])
        if not chunk.embedding.word_embeddings.weight.requires_grad:
            chunk.embedding.register_forward_hook(_require_gradient)
    # Some of its optimizers print what memory they use.
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=chunk,
            optimizer=_adamw(trained, plan.config.optim),
            config=config,
            mpu=Groups(mesh),
            dist_init_required=False,
        )
    _make_states(engine)
    return engine


def partitions(engine: Any) -> list[Tensor]:
    """Return the tensors that AdamW updates: this rank's parts of the masters, end to end."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        if hasattr(engine.optimizer, name):
            return getattr(engine.optimizer, name)
    return [p for group in engine.basic_optimizer.param_groups for p in group["params"]]


def partitions_in_memory(engine: Any) -> Iterator[Tensor]:
    """Yield `partitions`, each one that lies on disk read before and written with its state after.

    On disk are those of at least a megabyte, under offload to NVMe. Meanwhile they are empty.
    """
    zero = engine.optimizer
    for number, part in enumerate(partitions(engine)):
        is_on_disk = _offloads_to_disk(zero) and zero._swappable_optimizer_subgroup(number)
        if is_on_disk:
            zero._optimizer_states_and_gradient_swap_in(number)
        yield part
        if is_on_disk:
            zero._optimizer_states_and_gradient_swap_out(number)


def copy_weights_to_masters(engine: Any) -> None:
    """Copy the weights that ZeRO divides into the fp32 masters, also where they lie on disk."""
    zero = engine.optimizer
    if not _offloads_to_disk(zero):
        zero.refresh_fp32_params()
        return
    for number, part in enumerate(partitions_in_memory(engine)):
        weights = zero.fp16_partitioned_groups_flat[number]
        if weights is None:
            weights = torch.empty_like(part)
            zero._swap_in_sub_group_to_flat_buffer(weights, number)
        with torch.no_grad():
            part.copy_(weights)


def _offloads_to_disk(zero: Any) -> bool:
    """Return whether an optimizer of DeepSpeed keeps anything on NVMe; that of stage 3 may."""
    names = ("swap_optimizer", "params_in_nvme_and_cpu")
    return any(getattr(zero, name, False) for name in names)


def _adamw(trained: Sequence[TrainedParameter], config: OptimConfig) -> torch.optim.AdamW:
    """Return torch's AdamW over groups of equal weight decay and learning rate."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for one in trained:
        groups.setdefault((one.decays, one.lr_ratio), []).append(one.parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if decays else 0.0,
                "lr_ratio": ratio,
            }
            for (decays, ratio), parameters in groups.items()
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def _make_states(engine: Any) -> None:
    """Make AdamW's state, so that a checkpoint can be loaded and saved before the first step.

    DeepSpeed finds a parameter's part of a state only if it existed after the first group's step.
    """
    for part in partitions_in_memory(engine):
        engine.basic_optimizer.state[part] = {
            "step": torch.zeros((), dtype=torch.float32, device=part.device),
            "exp_avg": torch.zeros_like(part),
            "exp_avg_sq": torch.zeros_like(part),
        }
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()


def _mark_replicated(chunk: CausalLM, mesh: Mesh) -> None:
    """Let backward sum the gradients of weights that each tensor-parallel rank uses for its tokens.

    Megatron sums them after backward, by the mark; DeepSpeed does not know it.
    """
    for parameter in chunk.parameters():
        marks = vars(parameter)
        if marks.get("sequence_parallel", False) and mesh.tp_size > 1:
            marks["sums_over_tp"] = True


def _require_gradient(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
    """Ask for a gradient of the embedding's output: ZeRO-3 ends a layer's backward by its input."""
    return out.requires_grad_() if torch.is_grad_enabled() else out


def _check_async_io() -> None:
    if not has_async_io():
        raise ConfigError(
            [
                "offload to 'nvme': DeepSpeed's async_io cannot be built here; install libaio-dev, "
                "or set deepspeed.offload_optimizer and offload_parameters to 'cpu'"
            ]
        )
