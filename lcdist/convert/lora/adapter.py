"""LoRA adapters to and from PEFT's folders: adapter_config.json and adapter_model.safetensors.

A and B are PEFT's, under the names of Hugging Face's projections; what was trained whole (the
embedding, norms, the output layer) goes as `modules_to_save`. Such a folder says nothing of the
rotation or the attention: it belongs on what `lcdist convert export` makes of the base weights.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.checkpoint.read import Checkpoint, CheckpointError, open_checkpoint, saved_config
from lcdist.checkpoint.tensors import Stored
from lcdist.config.lora import Target
from lcdist.config.lora_sizes import target_shapes
from lcdist.config.schema import Config
from lcdist.convert.huggingface.names import (
    EMBEDDING,
    FINAL_NORM,
    HF_EMBEDDING,
    HF_FINAL_NORM,
    HF_OUTPUT,
    OUTPUT,
    hf_prefix,
    layer_prefix,
)
from lcdist.convert.huggingface.safetensors import Entry, Source, read_header, write_tensors
from lcdist.model.init import EXTRAS, LORA
from lcdist.utils.atomic import atomic_folder, check_free, sync_folder, write_file

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# By target, the module of a layer that has it: ours, and Hugging Face's.
MODULES: Mapping[Target, tuple[str, str]] = {
    "q": ("self_attention.linear_qkv", "self_attn.q_proj"),
    "k": ("self_attention.linear_qkv", "self_attn.k_proj"),
    "v": ("self_attention.linear_qkv", "self_attn.v_proj"),
    "o": ("self_attention.linear_proj", "self_attn.o_proj"),
    "gate": ("mlp.linear_fc1", "mlp.gate_proj"),
    "up": ("mlp.linear_fc1", "mlp.up_proj"),
    "down": ("mlp.linear_fc2", "mlp.down_proj"),
}
_NORMS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
}
# Keys of a PEFT configuration that change nothing of an adapter that is trained on.
_HARMLESS = {
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
# What an adapter may have begun as without the base weights having been changed for it.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class AdapterTensor:
    """One tensor on both sides. shape: whole, without padding of the vocabulary."""

    ours: str
    theirs: str
    shape: tuple[int, ...]
    key: str  # of [lora], that trains it


def adapter_twins(config: Config) -> list[AdapterTensor]:
    """The factors of every adapter of `config`."""
    rank, found = config.lora.rank, []
    for layer in range(config.model.num_layers):
        for target in config.lora.targets:
            out, into = target_shapes(config.model)[target]
            ours, theirs = MODULES[target]
            ours = f"{layer_prefix(layer)}{ours}{LORA}{target}."
            theirs = f"{PREFIX}{hf_prefix(layer)}{theirs}.lora_"
            found.append(AdapterTensor(f"{ours}A", f"{theirs}A.weight", (rank, into), "targets"))
            found.append(AdapterTensor(f"{ours}B", f"{theirs}B.weight", (out, rank), "targets"))
    return found


def whole_twins(config: Config) -> list[AdapterTensor]:
    """What may be trained whole beside adapters, whether `config` trains it or not."""
    model = config.model
    hidden, table = (model.hidden_size,), (model.vocab_size, model.hidden_size)
    found = [AdapterTensor(EMBEDDING, PREFIX + HF_EMBEDDING, table, "embeddings")]
    for layer in range(model.num_layers):
        found += [
            AdapterTensor(
                layer_prefix(layer) + ours, f"{PREFIX}{hf_prefix(layer)}{theirs}", hidden, "norms"
            )
            for ours, theirs in _NORMS.items()
        ]
    found.append(AdapterTensor(FINAL_NORM, PREFIX + HF_FINAL_NORM, hidden, "norms"))
    # PEFT writes the output layer that is the embedding a second time.
    ours, key = (EMBEDDING, "embeddings") if model.tied_embeddings else (OUTPUT, "head")
    found.append(AdapterTensor(ours, PREFIX + HF_OUTPUT, table, key))
    return found


def open_adapted(path: Path) -> tuple[Checkpoint, Config]:
    """A checkpoint with adapters, and its configuration. Raises CheckpointError without them."""
    checkpoint = open_checkpoint(path)
    config = saved_config(checkpoint)
    if not config.lora.rank:
        raise CheckpointError(
            f"{checkpoint.path} has no LoRA adapters: 'lcdist convert export' exports its weights"
        )
    return checkpoint, config


def export_adapter(path: Path, out: Path) -> None:
    """Write the adapters of the checkpoint at `path` into the new folder `out`, in PEFT's format.

    Raises CheckpointError or ValueError where there are none, where the attention learns what such
    a folder cannot hold, or where `out` exists.
    """
    checkpoint, config = open_adapted(path)
    stored = Stored(checkpoint)
    learned = [key for key in stored.names if EXTRAS in key]
    if learned:
        raise CheckpointError(
            f"{checkpoint.path}: the attention learns {learned[0]} and more, which an adapter's "
            "folder has no place for; merge the adapters and export the model instead"
        )
    twins = [t for t in whole_twins(config) if getattr(config.lora, t.key)]
    sources = [_source(stored, twin) for twin in (*adapter_twins(config), *twins)]
    check_free(out, sum(source.nbytes for source in sources))
    with atomic_folder(out) as half:
        with (half / TENSORS_FILE).open("wb") as stream:
            write_tensors(stream, sources)
            stream.flush()
            os.fsync(stream.fileno())
        write_file(half / CONFIG_FILE, json.dumps(_peft_config(config), indent=2) + "\n")
        sync_folder(half)


def _source(stored: Stored, twin: AdapterTensor) -> Source:
    def piece(first: int, stop: int) -> Callable[[], Tensor]:
        return lambda: stored.rows(twin.ours, first, stop)

    pieces = [piece(*span) for span in stored.pieces(twin.ours, twin.shape[0])]
    return Source(twin.theirs, stored.dtype(twin.ours), twin.shape, pieces)


def _peft_config(config: Config) -> dict[str, Any]:
    lora, tied = config.lora, config.model.tied_embeddings
    whole = ["embed_tokens"] if lora.embeddings else []
    whole += ["lm_head"] if lora.head and not tied else []
    whole += ["input_layernorm", "post_attention_layernorm", "model.norm"] if lora.norms else []
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [MODULES[target][1].split(".")[1] for target in lora.targets],
        "modules_to_save": whole or None,
        # The output layer that is the embedding stays so, from PEFT 0.18 on.
        "ensure_weight_tying": tied and lora.embeddings,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def check_adapter(folder: Path, config: Config) -> dict[str, Entry]:
    """By our name, where the tensors of PEFT's folder lie that a run as `config` starts from.

    Raises ValueError with all that is not the adapter `config` describes, by name.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"lora.load = '{folder}': no {CONFIG_FILE} there; give PEFT's folder")
    if not (folder / TENSORS_FILE).is_file():
        raise ValueError(
            f"lora.load = '{folder}': no {TENSORS_FILE} there; a .bin file can run code when it is "
            "opened: save the adapter again with safe_serialization=True"
        )
    try:
        table = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged: {error}") from error
    entries = read_header(folder / TENSORS_FILE)
    errors = [*_config_errors(table, config)] or [*_tensor_errors(entries, config)]
    if errors:
        raise ValueError(f"lora.load = '{folder}' does not fit: {'; '.join(errors)}")
    return {t.ours: entries[t.theirs] for t in _both(config) if t.theirs in entries}


def _both(config: Config) -> list[AdapterTensor]:
    return [*adapter_twins(config), *whole_twins(config)]


def _config_errors(table: Mapping[str, Any], config: Config) -> list[str]:
    lora = config.lora
    if table.get("peft_type") != "LORA":
        return [f"peft_type is {table.get('peft_type')!r}, not 'LORA'"]
    rank, alpha = table.get("r"), table.get("lora_alpha")
    errors = [] if rank == lora.rank else [f"its r is {rank}, lora.rank is {lora.rank}"]
    if isinstance(rank, int) and isinstance(alpha, int | float) and rank > 0:
        # rsLoRA (arXiv:2312.03732) counts alpha / sqrt(r).
        alpha = alpha * math.sqrt(rank) if table.get("use_rslora") else alpha
    if not isinstance(alpha, int | float) or not math.isclose(alpha, lora.alpha, rel_tol=1e-9):
        errors.append(f"lora.alpha is {lora.alpha}, set it to {alpha}")
    start = table.get("init_lora_weights", True)
    if start not in _PLAIN_INITS:
        errors.append(f"init_lora_weights is {start!r}, which changes the base weights as well")
    known = {*_HARMLESS, "init_lora_weights"}
    # Whatever else is switched on is something that this adapter would need and we do not do.
    for key, value in table.items():
        if (
            key not in known
            and value not in (None, False, "none", 0)
            and value != {}
            and value != []
        ):
            errors.append(f"{key} is {value!r}, which lcdist has not")
    return errors


def _tensor_errors(entries: Mapping[str, Entry], config: Config) -> list[str]:
    lora, factors, whole = config.lora, adapter_twins(config), whole_twins(config)
    theirs = {twin.theirs: twin for twin in (*factors, *whole)}
    errors = [f"{t.theirs} is missing" for t in factors if t.theirs not in entries]
    for name, entry in entries.items():
        twin = theirs.get(name)
        if twin is None:
            errors.append(f"{name} is of no target: lora.targets is {', '.join(lora.targets)}")
        elif entry.shape != twin.shape:
            errors.append(f"{name} has shape {[*entry.shape]}, not {[*twin.shape]}")
        elif twin.key != "targets" and not getattr(lora, twin.key):
            errors.append(f"{name} was trained too: set lora.{twin.key} = true")
    if config.model.tied_embeddings and not errors:
        tables = [entries.get(PREFIX + name) for name in (HF_EMBEDDING, HF_OUTPUT)]
        if any(tables) and not _alike(*tables):
            errors.append(
                f"{PREFIX}{HF_EMBEDDING} and {HF_OUTPUT} were trained apart, and "
                "model.tied_embeddings is true: PEFT's ensure_weight_tying keeps them one"
            )
    return [*errors[:8], *([f"and {len(errors) - 8} more"] if len(errors) > 8 else [])]


def _alike(one: Entry | None, other: Entry | None) -> bool:
    if one is None or other is None or one.dtype != other.dtype:
        return False
    spans = [(i, min(i + 1024, one.shape[0])) for i in range(0, one.shape[0], 1024)]
    return all(torch.equal(one.rows(*span), other.rows(*span)) for span in spans)


def read_adapter(folder: Path, config: Config) -> dict[str, Callable[[], Tensor]]:
    """Return, by our name, a function that reads each whole tensor of the PEFT adapter in `folder`.

    Raises as `check_adapter` does.
    """
    entries = check_adapter(folder, config)
    return {name: partial(entry.rows, 0, entry.shape[0]) for name, entry in entries.items()}
