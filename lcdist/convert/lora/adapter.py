"""Export and import LoRA adapters in PEFT's format.

A PEFT folder has adapter_config.json and adapter_model.safetensors, with factors A and B under the
names of Hugging Face's projections. Modules that were trained whole (embedding, norms, output
layer) are its `modules_to_save`. The format describes neither rotation nor attention: an adapter
belongs on the base weights that `lcdist convert export` writes.
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.checkpoint.manifest import Checkpoint, CheckpointError
from lcdist.checkpoint.read import open_checkpoint, saved_config
from lcdist.checkpoint.tensors import CheckpointTensors
from lcdist.checkpoint.verify import verify_checkpoint
from lcdist.config.schema import Config
from lcdist.convert.ancestors import base_model
from lcdist.convert.huggingface.names import HF_EMBEDDING, HF_OUTPUT
from lcdist.convert.huggingface.safetensors import (
    TensorEntry,
    TensorStream,
    read_header,
    stream_tensors,
)
from lcdist.convert.lora.names import (
    MODULES,
    PREFIX,
    AdapterTensor,
    factor_tensors,
    module_tensors,
)
from lcdist.model.init import METHOD_PARAMS
from lcdist.utils.atomic import atomic_folder, check_free, write_file
from lcdist.utils.digests import refuse_damaged_sums, write_sums

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Keys of a PEFT configuration that do not change what an adapter computes.
_IGNORED = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "r"),
    *("lora_alpha", "target_modules", "modules_to_save", "use_rslora", "auto_mapping"),
    *("peft_version", "layers_to_transform", "layers_pattern", "exclude_modules", "lora_dropout"),
    *(
        "ensure_weight_tying",
        "megatron_core",
        "megatron_config",
        "runtime_config",
        "qalora_group_size",
    ),
    "eva_config",
}
# Initializations that leave the base weights unchanged.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")


def open_lora_checkpoint(path: Path) -> tuple[Checkpoint, Config]:
    """Open a checkpoint and its configuration. Raises CheckpointError if it has no adapters."""
    checkpoint = open_checkpoint(path)
    verify_checkpoint(checkpoint)
    config = saved_config(checkpoint)
    if not config.lora.rank:
        raise CheckpointError(
            f"{checkpoint.path} has no LoRA adapters: 'lcdist convert export' exports its weights"
        )
    return checkpoint, config


def export_adapter(path: Path | str, out: Path | str) -> None:
    """Write the adapters of the checkpoint at `path` as the new PEFT folder `out`.

    Raises:
        CheckpointError: the checkpoint has no adapters, or its attention method learns tensors
            that the format cannot hold.
        ValueError: `out` exists.
    """
    out = Path(out)
    checkpoint, config = open_lora_checkpoint(Path(path))
    tensors = CheckpointTensors(checkpoint)
    extras = [key for key in tensors.names if METHOD_PARAMS in key]
    if extras:
        raise CheckpointError(
            f"{checkpoint.path}: the attention method learns {extras[0]}, which PEFT's format "
            "cannot hold; merge the adapters and export the model instead"
        )
    modules = [each for each in module_tensors(config) if getattr(config.lora, each.key)]
    streams = [_stream(tensors, each) for each in (*factor_tensors(config), *modules)]
    check_free(out, sum(stream.nbytes for stream in streams))
    with atomic_folder(out) as unfinished:
        with (unfinished / TENSORS_FILE).open("wb") as file:
            stream_tensors(file, streams)
        write_file(unfinished / CONFIG_FILE, json.dumps(_peft_config(config), indent=2) + "\n")
        write_sums(unfinished)


def _stream(tensors: CheckpointTensors, tensor: AdapterTensor) -> TensorStream:
    def row_reader(first: int, stop: int) -> Callable[[], Tensor]:
        return lambda: tensors.rows(tensor.ours, first, stop)

    pieces = [row_reader(*span) for span in tensors.pieces(tensor.ours, tensor.shape[0])]
    return TensorStream(tensor.theirs, tensors.dtype(tensor.ours), tensor.shape, pieces)


def _peft_config(config: Config) -> dict[str, Any]:
    lora, tied = config.lora, config.model.tied_embeddings
    modules = ["embed_tokens"] if lora.embeddings else []
    modules += ["lm_head"] if lora.head and not tied else []
    modules += ["input_layernorm", "post_attention_layernorm", "model.norm"] if lora.norms else []
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model(config),
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [MODULES[target][1].split(".")[1] for target in lora.targets],
        "modules_to_save": modules or None,
        # Keeps a tied output layer tied, from PEFT 0.18 on.
        "ensure_weight_tying": tied and lora.embeddings,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def check_adapter(folder: Path, config: Config) -> dict[str, TensorEntry]:
    """Check a PEFT folder that a run starts from, and return its tensors by our names.

    Raises:
        ValueError: listing everything that differs from the adapter in `config`.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"lora.load = '{folder}': it has no {CONFIG_FILE}; give PEFT's folder")
    if not (folder / TENSORS_FILE).is_file():
        raise ValueError(
            f"lora.load = '{folder}': it has no {TENSORS_FILE}; a .bin file can run code when "
            "opened: save the adapter again with safe_serialization=True"
        )
    try:
        table = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged: {error}") from error
    entries = read_header(folder / TENSORS_FILE)
    refuse_damaged_sums(folder)
    errors = [*_config_errors(table, config)] or [*_tensor_errors(entries, config)]
    if errors:
        raise ValueError(f"lora.load = '{folder}' does not fit: {'; '.join(errors)}")
    tensors = (*factor_tensors(config), *module_tensors(config))
    return {t.ours: entries[t.theirs] for t in tensors if t.theirs in entries}


def _config_errors(table: Mapping[str, Any], config: Config) -> list[str]:
    """Compare adapter_config.json with [lora]."""
    lora = config.lora
    if table.get("peft_type") != "LORA":
        return [f"peft_type is {table.get('peft_type')!r}, not 'LORA'"]
    rank, alpha = table.get("r"), table.get("lora_alpha")
    errors = [] if rank == lora.rank else [f"its r is {rank}, lora.rank is {lora.rank}"]
    if isinstance(rank, int) and isinstance(alpha, int | float) and rank > 0:
        # rsLoRA (arXiv:2312.03732) scales by alpha / sqrt(r).
        alpha = alpha * math.sqrt(rank) if table.get("use_rslora") else alpha
    if not isinstance(alpha, int | float) or not math.isclose(alpha, lora.alpha, rel_tol=1e-9):
        errors.append(f"lora.alpha is {lora.alpha}, set it to {alpha}")
    init = table.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        errors.append(f"init_lora_weights is {init!r}, which changes the base weights as well")
    known = {*_IGNORED, "init_lora_weights"}
    # Any other key that is switched on changes the adapter in a way that is not supported.
    for key, value in table.items():
        if (
            key not in known
            and value not in (None, False, "none", 0)
            and value != {}
            and value != []
        ):
            errors.append(f"{key} is {value!r}, which lcdist does not support")
    return errors


def _tensor_errors(entries: Mapping[str, TensorEntry], config: Config) -> list[str]:
    """Compare the tensors of a PEFT folder with those that `config` trains."""
    lora, factors, modules = config.lora, factor_tensors(config), module_tensors(config)
    by_name = {tensor.theirs: tensor for tensor in (*factors, *modules)}
    errors = [f"{t.theirs} is missing" for t in factors if t.theirs not in entries]
    for name, entry in entries.items():
        tensor = by_name.get(name)
        if tensor is None:
            errors.append(f"{name} belongs to no target: lora.targets is {', '.join(lora.targets)}")
        elif entry.shape != tensor.shape:
            errors.append(f"{name} has shape {[*entry.shape]}, not {[*tensor.shape]}")
        elif tensor.key != "targets" and not getattr(lora, tensor.key):
            errors.append(f"{name} was trained too: set lora.{tensor.key} = true")
    if config.model.tied_embeddings and not errors:
        tables = [entries.get(PREFIX + name) for name in (HF_EMBEDDING, HF_OUTPUT)]
        if any(tables) and not _equal_tensors(*tables):
            errors.append(
                f"{PREFIX}{HF_EMBEDDING} and {HF_OUTPUT} differ, and "
                "model.tied_embeddings is true: save the adapter with PEFT's ensure_weight_tying"
            )
    return [*errors[:8], *([f"and {len(errors) - 8} more"] if len(errors) > 8 else [])]


def _equal_tensors(one: TensorEntry | None, other: TensorEntry | None) -> bool:
    if one is None or other is None or one.dtype != other.dtype:
        return False
    spans = [(i, min(i + 1024, one.shape[0])) for i in range(0, one.shape[0], 1024)]
    return all(torch.equal(one.rows(*span), other.rows(*span)) for span in spans)


def read_adapter(folder: Path, config: Config) -> dict[str, Callable[[], Tensor]]:
    """Return, by our names, functions that read the unsharded tensors of the PEFT folder `folder`.

    Raises:
        ValueError: as `check_adapter`.
    """
    entries = check_adapter(folder, config)
    return {name: partial(entry.rows, 0, entry.shape[0]) for name, entry in entries.items()}
