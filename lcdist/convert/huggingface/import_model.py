"""A Hugging Face folder to a folder like a run's: one checkpoint that any mesh loads.

Nothing is written before config, index, header and shape of everything have been checked; then one
piece of a tensor at a time is read and written, and what was written is read back and compared.
Weights keep their dtype (fp16 ones become fp32, which holds each of them exactly).
"""

import json
import math
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.checkpoint.read import FORMAT, MANIFEST, open_checkpoint
from lcdist.checkpoint.tensors import Stored, Tensors, write_tensors
from lcdist.config import dump, parse
from lcdist.config.schema import AttentionConfig, Config, DataConfig, LogConfig, TrainConfig
from lcdist.convert.check import Difference, compare
from lcdist.convert.huggingface.config import CONFIG, HFModel, check_shapes, read_config
from lcdist.convert.huggingface.custom_attention import learned, reading
from lcdist.convert.huggingface.names import (
    EMBEDDING,
    HF_EMBEDDING,
    HF_OUTPUT,
    OUTPUT,
    FusedTensor,
    correspondence,
    hf_shapes,
)
from lcdist.convert.huggingface.tokenizer import check_tokenizer, copy_tokenizer
from lcdist.convert.huggingface.weights import Weights, open_weights
from lcdist.convert.streamed_forward import check_alone
from lcdist.distributed.mesh import start_world
from lcdist.plan import Plan, make_plan, plan_rows, smallest_world
from lcdist.rundir.header import versions
from lcdist.rundir.paths import LATEST, checkpoint_name
from lcdist.utils.atomic import atomic_folder, check_free, write_file

NAME = checkpoint_name(0)
# Made from the config by whoever runs the model; older folders hold them all the same.
_DERIVED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class Imported:
    """A checkpoint that was made: where, of how many parameters, and how it compares.

    new_tokens: by how many the vocabulary grew.
    """

    out: Path
    num_parameters: int
    difference: Difference
    new_tokens: int = 0


def import_model(
    source: Path, out: Path, overrides: Sequence[str] = (), extra_tokens: int = 0
) -> Imported:
    """Make `out` from the Hugging Face folder `source`.

    overrides: `section.key=value`, over a configuration that has the model's sections alone; of the
    model they may raise vocab_size. extra_tokens: by how many to raise it (landmark attention needs
    one). The rows of new tokens, which come last, are the mean of the old ones. Raises ValueError
    for everything that is wrong with the source, before anything is written; ConversionError where
    what was written does not compute what was read.
    """
    check_alone()
    hf, weights = open_model(source)
    config = _config(hf, out, [*overrides, *_grown(hf, overrides, extra_tokens)])
    plan = make_plan(config, smallest_world(config))
    check_free(out, weights.nbytes)
    start_world(config.parallel.timeout)
    with atomic_folder(out) as half:
        folder = half / "checkpoints" / NAME
        folder.mkdir(parents=True)
        write_tensors(folder, _tensors(hf, weights, plan))
        _finish(folder, plan, source)
        copy_tokenizer([source], half)
        # For whoever exports what was trained from here: the numbers of special tokens.
        shutil.copyfile(source / CONFIG, half / CONFIG)
        stored = Stored(open_checkpoint(half))
        difference = compare(hf, weights, config, stored)
    shapes = hf_shapes(config.model, _extras(hf)).values()
    new_tokens = config.model.vocab_size - hf.model.vocab_size
    return Imported(out, sum(math.prod(shape) for shape in shapes), difference, new_tokens)


def open_model(folder: Path) -> tuple[HFModel, Weights]:
    """A Hugging Face folder whose config, weights and tokenizer fit each other.

    Raises ValueError naming all that does not.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give one with {CONFIG} and .safetensors files")
    hf, weights = read_config(folder), open_weights(folder)
    want = hf_shapes(hf.model, _extras(hf))
    derived = {name for name in weights.entries if name.endswith(_DERIVED)}
    shapes = {name: entry.shape for name, entry in weights.entries.items() if name not in derived}
    if hf.model.tied_embeddings and shapes.get(HF_OUTPUT) == want[HF_EMBEDDING]:
        _check_tied(weights)
        del shapes[HF_OUTPUT]
    check_shapes(folder, shapes, want)
    check_tokenizer(folder, hf.model.vocab_size)
    needed = {name: weights.entries[name] for name in want}
    return hf, Weights(folder, needed)


def _check_tied(weights: Weights) -> None:
    """Raise ValueError unless a second copy of tied embeddings is one."""
    count, _ = weights.shape(HF_OUTPUT)
    for first in range(0, count, 1024):
        stop = min(first + 1024, count)
        if not torch.equal(
            weights.rows(HF_OUTPUT, first, stop), weights.rows(HF_EMBEDDING, first, stop)
        ):
            raise ValueError(
                f"{weights.folder}: {HF_OUTPUT} differs from {HF_EMBEDDING}, which {CONFIG} says "
                "is tied to it: set tie_word_embeddings to false, or remove the tensor"
            )


def _grown(hf: HFModel, overrides: Sequence[str], extra_tokens: int) -> list[str]:
    """The override of vocab_size that `extra_tokens` means. Raises ValueError for two of them."""
    if extra_tokens < 0:
        raise ValueError(f"--extra-tokens {extra_tokens}: must be at least 0")
    if extra_tokens and any(word.startswith("model.vocab_size=") for word in overrides):
        raise ValueError(
            f"--extra-tokens {extra_tokens} and model.vocab_size both say how many tokens the "
            "model is to have: leave one out"
        )
    return [f"model.vocab_size={hf.model.vocab_size + extra_tokens}"] if extra_tokens else []


def _config(hf: HFModel, out: Path, overrides: Sequence[str]) -> Config:
    """The configuration that the checkpoint carries. Raises ValueError, or ConfigError."""
    bare = Config(
        model=hf.model,
        attention=hf.attention,
        train=TrainConfig(seqlen=hf.seqlen, steps=1),
        data=DataConfig(path=str(out)),
        log=LogConfig(folder=str(out)),
    )
    config = parse(tomllib.loads(dump(bare)), overrides)
    names = [field.name for field in fields(config.model)]
    for name in names:
        theirs, ours = getattr(hf.model, name), getattr(config.model, name)
        if name not in ("vocab_size", "init_std") and theirs != ours:
            raise ValueError(
                f"model.{name} = {ours!r}: {CONFIG} says {theirs!r}, and an import keeps the model "
                "as it is; change it in the configuration of the run that starts from it"
            )
    asked = replace(config.attention, impl=hf.attention.impl)
    if hf.attention != AttentionConfig() and asked != hf.attention:
        raise ValueError(
            f"attention.method = '{asked.method}', attention.layers = '{asked.layers}': {CONFIG} "
            "says how the model attends, and an import keeps it; change it in the configuration of "
            "the run that starts from it"
        )
    landmarks = any(
        "landmarks" in layer.method.supports for layer in reading(hf.model, hf.attention)
    )
    if landmarks and config.model.vocab_size > hf.model.vocab_size:
        raise ValueError(
            f"model.vocab_size = {config.model.vocab_size}: the last of the model's "
            f"{hf.model.vocab_size} tokens is its landmark, and would not be the last any more"
        )
    if config.model.vocab_size < hf.model.vocab_size:
        raise ValueError(
            f"model.vocab_size = {config.model.vocab_size}: the model has {hf.model.vocab_size} "
            "tokens, of which none can be left out"
        )
    return config


def _tensors(hf: HFModel, weights: Weights, plan: Plan) -> list[Tensors]:
    return [
        _of_vocabulary(ours, weights, plan)
        if ours.key in (EMBEDDING, OUTPUT)
        else Tensors(
            ours.key,
            (ours.count, *ours.rest),
            _dtype(ours, weights),
            lambda first, stop, ours=ours: _rows(ours, weights, first, stop),
        )
        for ours in (*correspondence(hf.model), *_extras(hf))
    ]


def _extras(hf: HFModel) -> list[FusedTensor]:
    return learned(hf.model, reading(hf.model, hf.attention))


def _rows(ours: FusedTensor, weights: Weights, first: int, stop: int) -> Tensor:
    dtype = _dtype(ours, weights)
    parts = [
        weights.rows(part.name, part.first, part.first + part.count).to(dtype)
        for part in ours.slices(first, stop)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _dtype(ours: FusedTensor, weights: Weights) -> torch.dtype:
    """Of tensors that become one, fp32 where they differ: it holds what the others hold."""
    found = {weights.dtype(part.name) for part in ours.parts}
    return found.pop() if len(found) == 1 else torch.float32


def _of_vocabulary(ours: FusedTensor, weights: Weights, plan: Plan) -> Tensors:
    """A table by tokens: the model's rows, the mean of them for new tokens, zeros for padding."""
    known, asked, dtype = ours.count, plan.config.model.vocab_size, _dtype(ours, weights)
    mean = _mean(ours, weights).to(dtype) if asked > known else None

    def rows(first: int, stop: int) -> Tensor:
        if stop <= known:
            return _rows(ours, weights, first, stop)
        out = torch.zeros(stop - first, *ours.rest, dtype=dtype)
        old = max(0, min(stop, known) - first)
        if old:
            out[:old] = _rows(ours, weights, first, first + old)
        if mean is not None:
            out[max(0, known - first) : max(0, asked - first)] = mean
        return out

    return Tensors(ours.key, (plan.shape.padded_vocab_size, *ours.rest), dtype, rows)


def _mean(ours: FusedTensor, weights: Weights) -> Tensor:
    total = torch.zeros(ours.rest, dtype=torch.float64)
    for first in range(0, ours.count, 1024):
        total += _rows(ours, weights, first, min(first + 1024, ours.count)).double().sum(0)
    return total / ours.count


def _finish(folder: Path, plan: Plan, source: Path) -> None:
    """The manifest, as a run's checkpoints have it, and what names the checkpoint."""
    content = {
        "format": FORMAT,
        "step": 0,
        "config": dump(plan.config),
        "plan": dict(plan_rows(plan)),
        "dtype": plan.dtype,
        "world_size": plan.world_size,
        "loader": {},
        "random_states": [],
        "imported": source.resolve().name,
        "versions": versions(),
        "files": {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()},
    }
    write_file(folder / MANIFEST, json.dumps(content, indent=1))
    write_file(folder.parent / LATEST, folder.name + "\n")
