"""Import a Hugging Face folder as a folder with one checkpoint that any mesh loads.

Config, index, headers and shapes are checked before anything is written. Then one piece of a tensor
at a time is read and written, and the result is read back and compared. Weights keep their dtype,
except that fp16 becomes fp32, which holds every fp16 number exactly.
"""

import math
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.checkpoint.manifest import write_latest, write_manifest
from lcdist.checkpoint.read import open_checkpoint
from lcdist.checkpoint.tensors import CheckpointTensors, write_tensors
from lcdist.config import dump, parse
from lcdist.config.schema import AttentionConfig, Config, DataConfig, LogConfig, TrainConfig
from lcdist.convert.ancestors import IMPORTED_FROM
from lcdist.convert.check import LogitDifference, compare
from lcdist.convert.deepspeed.weights import open_deepspeed
from lcdist.convert.huggingface.config import CONFIG, HFModel, read_config
from lcdist.convert.huggingface.custom_attention import (
    has_landmarks,
    inference_layers,
    method_parameters,
)
from lcdist.convert.huggingface.gguf import refuse_gguf
from lcdist.convert.huggingface.import_tensors import tensor_sources
from lcdist.convert.huggingface.names import (
    HF_EMBEDDING,
    HF_OUTPUT,
    FusedTensor,
    check_shapes,
    fused_tensors,
    hf_shapes,
)
from lcdist.convert.huggingface.tokenizer import check_tokenizer, copy_tokenizer
from lcdist.convert.huggingface.weights import Weights, open_weights
from lcdist.convert.streamed_forward import check_single_process
from lcdist.distributed.mesh import start_world
from lcdist.plan import Plan, make_plan, plan_rows, smallest_world
from lcdist.rundir.header import versions
from lcdist.rundir.paths import CHECKPOINTS, checkpoint_name
from lcdist.utils.atomic import atomic_folder, check_free
from lcdist.utils.digests import refuse_damaged_sums, write_sums
from lcdist.utils.progress import Progress, silent

# Rotary frequencies, which older folders store; the config determines them.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class ImportResult:
    """Result of an import.

    Attributes:
        out: folder of the checkpoint.
        num_parameters: parameters of the model.
        difference: logits of the checkpoint compared with the source's.
        num_new_tokens: tokens added to the vocabulary.
        note: what was read from DeepSpeed's checkpoint and what is lost; empty without one.
    """

    out: Path
    num_parameters: int
    difference: LogitDifference
    num_new_tokens: int = 0
    note: str = ""


def import_model(
    source: Path | str,
    out: Path | str,
    overrides: Sequence[str] = (),
    extra_tokens: int = 0,
    deepspeed: Path | None = None,
    progress: Progress = silent,
) -> ImportResult:
    """Write the Hugging Face model in `source` as a checkpoint into the new folder `out`.

    Args:
        source: Hugging Face folder.
        out: folder to create.
        overrides: `section.key=value` over a configuration that has only the model's sections; in
            `[model]` they may only raise vocab_size.
        extra_tokens: tokens to add to the vocabulary (landmark attention needs one). Their rows
            come last and are the mean of the others.
        deepspeed: checkpoint of DeepSpeed to read the weights from; `source` needs none then.
        progress: called with the bytes that are written.

    Raises:
        ValueError: the source or an override is wrong; nothing has been written.
        ConversionError: the checkpoint's logits differ from the source's; nothing is kept.
    """
    check_single_process()
    source, out = Path(source), Path(out)
    hf, weights, note = _open_source(source, deepspeed)
    refuse_damaged_sums(source)
    config = _import_config(hf, out, [*overrides, *_vocab_override(hf, overrides, extra_tokens)])
    plan = make_plan(config, smallest_world(config))
    check_free(out, weights.nbytes)
    start_world(config.parallel.timeout)
    with atomic_folder(out) as partial:
        folder = partial / CHECKPOINTS / checkpoint_name(0)
        folder.mkdir(parents=True)
        fused = [*fused_tensors(hf.model), *_method_parameters(hf)]
        write_tensors(folder, tensor_sources(fused, weights, plan), progress)
        _write_manifest(folder, plan, source)
        copy_tokenizer([source], partial)
        # An export of a run that starts here takes the ids of special tokens from it.
        shutil.copyfile(source / CONFIG, partial / CONFIG)
        write_sums(partial)
        tensors = CheckpointTensors(open_checkpoint(partial))
        difference = compare(hf, weights, config, tensors, progress)
    shapes = hf_shapes(config.model, _method_parameters(hf)).values()
    num_new_tokens = config.model.vocab_size - hf.model.vocab_size
    num_parameters = sum(math.prod(shape) for shape in shapes)
    return ImportResult(out, num_parameters, difference, num_new_tokens, note)


def open_model(folder: Path) -> tuple[HFModel, Weights]:
    """Open a Hugging Face folder and check that config, weights and tokenizer fit each other.

    Raises:
        ValueError: naming everything that does not fit.
    """
    hf, weights, _ = _open_source(folder, None)
    return hf, weights


def _open_source(folder: Path, deepspeed: Path | None) -> tuple[HFModel, Weights, str]:
    """Open as `open_model`, with the weights from `deepspeed` if given; return a note on them."""
    if deepspeed is None:
        refuse_gguf(folder)
    if not folder.is_dir():
        what = "a file, not a folder" if folder.exists() else "no such folder"
        raise ValueError(f"{folder}: {what}; give one with {CONFIG} and .safetensors files")
    hf, note = read_config(folder), ""
    expected = hf_shapes(hf.model, _method_parameters(hf))
    if deepspeed is None:
        weights = open_weights(folder)
    else:
        weights, note = open_deepspeed(deepspeed, expected)
    shapes = {
        name: entry.shape
        for name, entry in weights.entries.items()
        if not name.endswith(_IGNORED_SUFFIX)
    }
    if hf.model.tied_embeddings and shapes.get(HF_OUTPUT) == expected[HF_EMBEDDING]:
        _check_tied(weights)
        del shapes[HF_OUTPUT]
    check_shapes(weights.folder, shapes, expected)
    check_tokenizer(folder, hf.model.vocab_size)
    kept = {name: weights.entries[name] for name in expected}
    return hf, Weights(weights.folder, kept), note


def _check_tied(weights: Weights) -> None:
    """Raise ValueError if a tied output layer is stored and differs from the embedding."""
    count, _ = weights.shape(HF_OUTPUT)
    for first in range(0, count, 1024):
        stop = min(first + 1024, count)
        if not torch.equal(
            weights.rows(HF_OUTPUT, first, stop), weights.rows(HF_EMBEDDING, first, stop)
        ):
            raise ValueError(
                f"{weights.folder}: {HF_OUTPUT} differs from {HF_EMBEDDING}, but {CONFIG} ties "
                "them: set tie_word_embeddings to false, or remove the tensor"
            )


def _vocab_override(hf: HFModel, overrides: Sequence[str], extra_tokens: int) -> list[str]:
    """Return the override of vocab_size for `extra_tokens`.

    Raises:
        ValueError: `extra_tokens` is negative, or `overrides` set vocab_size too.
    """
    if extra_tokens < 0:
        raise ValueError(f"--extra-tokens {extra_tokens}: must be at least 0")
    if extra_tokens and any(word.startswith("model.vocab_size=") for word in overrides):
        raise ValueError(
            f"--extra-tokens {extra_tokens} and model.vocab_size both set the size of the "
            "vocabulary: leave one out"
        )
    return [f"model.vocab_size={hf.model.vocab_size + extra_tokens}"] if extra_tokens else []


def _import_config(hf: HFModel, out: Path, overrides: Sequence[str]) -> Config:
    """Return the configuration of the checkpoint.

    Raises:
        ValueError: an override is invalid or changes the model.
    """
    base = Config(
        model=hf.model,
        attention=hf.attention,
        train=TrainConfig(seqlen=hf.seqlen, steps=1),
        data=DataConfig(path=str(out)),
        log=LogConfig(folder=str(out)),
    )
    config = parse(tomllib.loads(dump(base)), overrides)
    for name in (field.name for field in fields(config.model)):
        theirs, ours = getattr(hf.model, name), getattr(config.model, name)
        if name not in ("vocab_size", "init_std") and theirs != ours:
            raise ValueError(
                f"model.{name} = {ours!r}: {CONFIG} says {theirs!r}, and an import keeps the "
                "model; change it in the configuration of the run that starts from it"
            )
    attention = replace(config.attention, impl=hf.attention.impl)
    if hf.attention != AttentionConfig() and attention != hf.attention:
        raise ValueError(
            f"attention.method = '{attention.method}', attention.layers = '{attention.layers}': "
            f"{CONFIG} determines the attention, and an import keeps it; change it in the "
            "configuration of the run that starts from it"
        )
    vocab_size, hf_vocab_size = config.model.vocab_size, hf.model.vocab_size
    if vocab_size > hf_vocab_size and has_landmarks(inference_layers(hf.model, hf.attention)):
        raise ValueError(
            f"model.vocab_size = {vocab_size}: the last of the model's {hf_vocab_size} tokens is "
            "its landmark and must stay the last; leave model.vocab_size and --extra-tokens out"
        )
    if vocab_size < hf_vocab_size:
        raise ValueError(
            f"model.vocab_size = {vocab_size}: the model has {hf_vocab_size} tokens, and none can "
            "be left out"
        )
    return config


def _method_parameters(hf: HFModel) -> list[FusedTensor]:
    return method_parameters(hf.model, inference_layers(hf.model, hf.attention))


def _write_manifest(folder: Path, plan: Plan, source: Path) -> None:
    content = {
        "config": dump(plan.config),
        "plan": dict(plan_rows(plan)),
        "dtype": plan.dtype,
        "world_size": plan.world_size,
        "loader": {},
        "random_states": [],
        "imported": source.resolve().name,
        IMPORTED_FROM: str(source.resolve()),
        "versions": versions(),
    }
    write_manifest(folder, 0, content)
    write_latest(folder)
