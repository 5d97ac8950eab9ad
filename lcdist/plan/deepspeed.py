"""DeepSpeed's configuration for a run, and what a user's own file may say beside it."""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lcdist.config.deepspeed import DeepSpeedConfig
from lcdist.config.schema import Config
from lcdist.plan.shape import RunShape

INSTALL = "pip install 'lcdist[deepspeed]', or set train.engine = 'megatron'"
# Of a user's file: groups of settings that change speed, memory or logging and no number.
NEUTRAL = ("zero_optimization", "aio", "comms_logger", "memory_breakdown", "dump_state")
NEUTRAL += ("wall_clock_breakdown", "steps_per_print")
# Of `zero_optimization`: settings that change speed or memory alone.
NEUTRAL_ZERO = ("contiguous_gradients", "reduce_scatter", "allgather_partitions", "sub_group_size")
NEUTRAL_ZERO += ("round_robin_gradients", "use_multi_rank_bucket_allreduce")
NEUTRAL_ZERO += ("stage3_max_live_parameters", "stage3_max_reuse_distance")
NEUTRAL_ZERO += ("stage3_param_persistence_threshold", "stage3_model_persistence_threshold")
NEUTRAL_OFFLOAD = ("device", "nvme_path", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu")
NEUTRAL_OFFLOAD += ("pipeline_read", "pipeline_write", "fast_init")
# DeepSpeed's default for a buffer that weights on a disk pass through.
DISK_BUFFER_ELEMENTS = 100_000_000
# Least buffers of offload to a disk that reads and writes ahead.
PIPELINE_BUFFERS = 12
# Other keys and what is to be set instead.
REMEDIES = {
    "optimizer": "set [optim]: the optimizer is AdamW",
    "scheduler": "set optim.schedule, warmup_steps and min_lr",
    "fp16": "set train.dtype = 'bf16': losses are not scaled",
    "activation_checkpointing": "set train.recompute and train.offload",
    "sequence_parallel_size": "set parallel.cp_size",
    "tensor_parallel": "set parallel.tp_size",
    # DeepSpeed's count has context-parallel ranks as data-parallel ones.
    "train_batch_size": "set train.global_batch_size",
    "pipeline": "set train.engine = 'megatron' and parallel.pp_size",
}


def check_deepspeed(config: Config, dtype: str, errors: list[str]) -> None:
    """Check that DeepSpeed is installed and that its settings fit the run.

    dtype: of the weights, "fp32" or "bf16".
    """
    settings, parallel = config.deepspeed, config.parallel
    if config.train.engine != "deepspeed":
        _check_unused(settings, errors)
        return
    if importlib.util.find_spec("deepspeed") is None:
        errors.append(f"train.engine = 'deepspeed': DeepSpeed is not installed; {INSTALL}")
    if parallel.pp_size > 1:
        errors.append(
            f"parallel.pp_size = {parallel.pp_size} with train.engine = 'deepspeed': DeepSpeed "
            "reduces gradients at the end of its own backward passes, not in a pipeline schedule; "
            "set parallel.pp_size = 1, or train.engine = 'megatron'"
        )
    if config.train.on_bad_step == "skip":
        errors.append(
            "train.on_bad_step = 'skip': a gradient that is not finite stays in ZeRO's buffers, so "
            "no step can be skipped under DeepSpeed; set train.on_bad_step = 'stop', or "
            "train.engine = 'megatron'"
        )
    if settings.stage == 0 and dtype == "bf16":
        errors.append(
            f"deepspeed.stage = 0 with train.dtype = '{config.train.dtype}': weights are bf16 here "
            "and DeepSpeed keeps no fp32 masters of them; set deepspeed.stage = 1, 2 or 3, or "
            "train.dtype = 'fp32'"
        )
    _check_offload(settings, dtype, errors)


def _check_unused(settings: DeepSpeedConfig, errors: list[str]) -> None:
    """Check that no setting of DeepSpeed is given without its engine."""
    default = DeepSpeedConfig()
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value != getattr(default, field.name):
            errors.append(
                f"deepspeed.{field.name} = {value!r} has no effect with train.engine = 'megatron'; "
                "leave it out, or set train.engine = 'deepspeed'"
            )


def _check_offload(settings: DeepSpeedConfig, dtype: str, errors: list[str]) -> None:
    """Check that the stage can offload what is to be offloaded, and at this precision."""
    if settings.offload_parameters != "none" and settings.stage < 3:
        errors.append(
            f"deepspeed.offload_parameters = '{settings.offload_parameters}' needs "
            f"deepspeed.stage = 3, not {settings.stage}"
        )
    if settings.offload_optimizer != "none" and settings.stage < 1:
        errors.append(
            f"deepspeed.offload_optimizer = '{settings.offload_optimizer}' needs deepspeed.stage = "
            "1, 2 or 3, not 0"
        )
    if settings.offload_optimizer == "nvme" and settings.stage < 3:
        errors.append(
            "deepspeed.offload_optimizer = 'nvme' needs deepspeed.stage = 3, not "
            f"{settings.stage}; or set it to 'cpu'"
        )
    if settings.offload_parameters == "nvme" and dtype != "bf16":
        errors.append(
            f"deepspeed.offload_parameters = 'nvme' with train.dtype = '{dtype}': DeepSpeed writes "
            "weights to the disk in 16 bits; set train.dtype = 'bf16', or offload them to 'cpu'"
        )
    if "nvme" in (settings.offload_optimizer, settings.offload_parameters) and (
        not settings.nvme_folder
    ):
        errors.append(
            "deepspeed.nvme_folder is empty; name a folder on a fast disk, or offload to 'cpu'"
        )


def without_deepspeed(config: Config) -> Config:
    """Return the configuration for a model that is not trained, on any number of ranks.

    A trained model is read where DeepSpeed is not installed, and without the file of its run.
    """
    train = replace(config.train, engine="megatron")
    return replace(config, train=train, deepspeed=DeepSpeedConfig())


def run_settings(shape: RunShape, errors: list[str]) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a run, with what the user's file adds.

    errors: a line is added for every setting of the file that cannot be used.
    """
    file = read_deepspeed_file(shape.config, errors)
    return merged(deepspeed_config(shape), file, errors)


def deepspeed_config(shape: RunShape) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a run, without a user's file."""
    config, settings = shape.config, shape.config.deepspeed
    zero: dict[str, Any] = {
        "stage": settings.stage,
        "overlap_comm": settings.overlap,
        "reduce_bucket_size": settings.reduce_bucket_elements,
        "allgather_bucket_size": settings.gather_bucket_elements,
        "stage3_prefetch_bucket_size": settings.gather_bucket_elements,
        **_offload("offload_optimizer", settings.offload_optimizer, settings.nvme_folder),
        **_offload("offload_param", settings.offload_parameters, settings.nvme_folder),
    }
    if settings.offload_parameters == "nvme":
        zero["offload_param"]["buffer_size"] = disk_buffer_elements(shape)
    # Gradients are summed as under Megatron.
    precision: dict[str, Any] = {
        "bf16": {"enabled": shape.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if shape.dtype == "bf16":
        # A step that is not finite is refused.
        precision["bf16"]["check_grad_overflow"] = True
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": shape.num_micro_batches,
        # Without ZeRO the engine clips: DeepSpeed would not report the norm.
        "gradient_clipping": config.optim.clip_norm if settings.stage else 0.0,
        "zero_optimization": zero,
        # With it ZeRO-2 and 3 end in an assertion, and ranks under ZeRO-1 in bf16 hang.
        "prescale_gradients": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **precision,
    }


def disk_buffer_elements(shape: RunShape) -> int:
    """Return the elements of a buffer for weights on a disk: a rank's part of the largest one.

    DeepSpeed's default is 100 million, and a larger weight would not fit.
    """
    model, parallel = shape.config.model, shape.config.parallel
    attention = (model.nheads + 2 * shape.nheads_kv) * shape.head_dim
    rows = max(shape.padded_vocab_size, 2 * model.ffn_hidden_size, attention)
    ranks = shape.dp_size * parallel.cp_size
    return max(DISK_BUFFER_ELEMENTS, -(-rows // parallel.tp_size * model.hidden_size // ranks))


def _offload(key: str, target: str, folder: str) -> dict[str, Any]:
    if target == "none":
        return {}
    where = {"nvme_path": folder} if target == "nvme" else {}
    return {key: {"device": target, "pin_memory": True, **where}}


def read_deepspeed_file(config: Config, errors: list[str]) -> dict[str, Any]:
    """Return what `deepspeed.json_file` holds; an empty dict without one or after an error."""
    path = config.deepspeed.json_file
    if not path:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        errors.append(
            f"deepspeed.json_file = '{path}': {error}; name a JSON file, or leave it empty"
        )
        return {}
    if not isinstance(found, dict):
        errors.append(f"deepspeed.json_file = '{path}': it holds no JSON object")
        return {}
    return found


def merged(ours: dict[str, Any], theirs: dict[str, Any], errors: list[str]) -> dict[str, Any]:
    """Return the run's configuration with a user's settings added.

    Args:
        ours: as of `deepspeed_config`.
        theirs: the user's file. "auto" stands for the run's value, as in Hugging Face's files.
        errors: a line is added for every setting that contradicts the run.
    """
    errors += _contradictions(ours, theirs, "")
    for key, value in theirs.items():
        off = isinstance(value, dict) and value.get("enabled") is False
        if key in REMEDIES and not off and value != "auto":
            errors.append(f"{key} in deepspeed.json_file: leave it out, and {REMEDIES[key]}")
        elif key not in (*ours, *NEUTRAL, *REMEDIES) and not off:
            errors.append(f"{key} in deepspeed.json_file is not supported; leave it out")
    errors += _unknown_zero_keys(ours, theirs)
    errors += _too_few_buffers(theirs)
    return _with(ours, theirs)


def _unknown_zero_keys(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each setting of ZeRO that is not known to leave all numbers as they are."""
    zero = theirs.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return
    for key, value in zero.items():
        if key in ("offload_optimizer", "offload_param") and isinstance(value, dict):
            unknown = [f"{key}.{inner}" for inner in value if inner not in NEUTRAL_OFFLOAD]
            if key not in ours["zero_optimization"] and value.get("device", "none") != "none":
                name = key.replace("param", "parameters")
                yield (
                    f"zero_optimization.{key} in deepspeed.json_file: set deepspeed.{name} = "
                    f"'{value['device']}', so that the plan counts it"
                )
        else:
            is_known = key in ours["zero_optimization"] or key in NEUTRAL_ZERO
            unknown = [] if is_known else [key]
        for name in unknown:
            yield (
                f"zero_optimization.{name} in deepspeed.json_file is not supported; leave it out, "
                f"or use some of {', '.join(sorted(NEUTRAL_ZERO))}"
            )


def _too_few_buffers(theirs: dict[str, Any]) -> Iterator[str]:
    """Yield a line if states are read or written ahead without buffers for that.

    Four tensors each of three groups of states: one is updated, one read ahead, one still written.
    """
    zero = theirs.get("zero_optimization", {})
    offload = zero.get("offload_optimizer", {}) if isinstance(zero, dict) else {}
    if not isinstance(offload, dict):
        return
    count = offload.get("buffer_count", 4)
    ahead = [key for key in ("pipeline_read", "pipeline_write") if offload.get(key) is True]
    if ahead and not (isinstance(count, int) and count >= PIPELINE_BUFFERS):
        yield (
            f"zero_optimization.offload_optimizer in deepspeed.json_file: {' and '.join(ahead)} "
            f"with buffer_count = {count!r}; set buffer_count to {PIPELINE_BUFFERS} or more, or "
            "leave both out"
        )


def _contradictions(ours: dict[str, Any], theirs: dict[str, Any], prefix: str) -> Iterator[str]:
    for key in ours.keys() & theirs.keys():
        mine, other = ours[key], theirs[key]
        if isinstance(mine, dict) and isinstance(other, dict):
            yield from _contradictions(mine, other, f"{prefix}{key}.")
        elif other != "auto" and other != mine:
            yield (
                f"{prefix}{key} = {other!r} in deepspeed.json_file, but the run says {mine!r}; "
                "leave it out or make both equal"
            )


def _with(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Return `ours` with the keys that only `theirs` has."""
    total = dict(ours)
    for key, value in theirs.items():
        if isinstance(value, dict) and isinstance(total.get(key), dict):
            total[key] = _with(total[key], value)
        elif key not in total and value != "auto":
            total[key] = value
    return total
