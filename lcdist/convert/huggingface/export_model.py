"""A checkpoint to a Hugging Face folder: config.json, safetensors shards, the tokenizer's files.

Where attention is not a plain LLaMA's, the code for `transformers` goes along. Weights are read and
written tensor by tensor, in the dtype they are stored in. At the end what was written is read back,
its config included, and compared with the checkpoint.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcdist.checkpoint.read import Checkpoint, CheckpointError, open_checkpoint, saved_config
from lcdist.checkpoint.tensors import Stored
from lcdist.config.schema import Config, ModelConfig
from lcdist.convert.check import Difference, compare
from lcdist.convert.huggingface.config import CONFIG, config_table
from lcdist.convert.huggingface.custom_attention import about, learned, modelling, reading
from lcdist.convert.huggingface.import_model import open_model
from lcdist.convert.huggingface.names import (
    EMBEDDING,
    OUTPUT,
    FusedTensor,
    correspondence,
    hf_shapes,
)
from lcdist.convert.huggingface.safetensors import Source, write_tensors
from lcdist.convert.huggingface.tokenizer import copy_tokenizer
from lcdist.convert.huggingface.weights import INDEX, SINGLE
from lcdist.convert.streamed_forward import check_alone
from lcdist.data.datasets.build import held_out_folder
from lcdist.distributed.mesh import start_world
from lcdist.model.init import LORA
from lcdist.utils.atomic import atomic_folder, check_free, sync_folder, write_file

log = logging.getLogger(__name__)

SHARD_BYTES = 5 * 10**9
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Exported:
    """A Hugging Face folder that was made: where, its shards, and how it compares."""

    out: Path
    shards: Sequence[str]
    difference: Difference


def export_model(path: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> Exported:
    """Make the Hugging Face folder `out` from the checkpoint at `path`, or a run's latest.

    shard_bytes: of the tensors in one file at most, unless one tensor alone has more. Raises
    CheckpointError or ValueError for what is wrong, before anything is written; ConversionError
    where what was written does not compute what was read.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard size of {shard_bytes} bytes: must be at least 1")
    check_alone()
    checkpoint = open_checkpoint(path)
    config = saved_config(checkpoint)
    layers = reading(config.model, config.attention)
    extras, (files, keys) = learned(config.model, layers), modelling(layers)
    stored = Stored(checkpoint)
    _check(checkpoint, config, stored, extras)
    sources = _sources(config.model, stored, extras)
    folders = _tokenizer_folders(checkpoint, config)
    table = {**_table(checkpoint, config, stored, folders), **keys}
    check_free(out, sum(source.nbytes for source in sources))
    start_world(config.parallel.timeout)
    with atomic_folder(out) as half:
        names = _write_shards(half, sources, shard_bytes)
        write_file(half / CONFIG, json.dumps(table, indent=2) + "\n")
        for name, text in files.items():
            write_file(half / name, text)
        if not copy_tokenizer(folders, half):
            log.warning("no tokenizer was found: %s has none", out)
        hf, weights = open_model(half)
        difference = compare(hf, weights, config, stored)
    return Exported(out, names, difference)


def _check(
    checkpoint: Checkpoint, config: Config, stored: Stored, extras: Sequence[FusedTensor]
) -> None:
    """Raise CheckpointError naming the weights that are not those of the configuration's model."""
    if any(LORA in key for key in stored.names):
        raise CheckpointError(
            f"{checkpoint.path} has LoRA adapters: merge them into the weights first "
            "(lcdist convert merge), and export that"
        )
    model = config.model
    if model.hidden_size % model.nheads:
        raise ValueError(
            f"model.hidden_size = {model.hidden_size} is not a multiple of model.nheads = "
            f"{model.nheads}: transformers reads no such model"
        )
    wanted = {ours.key: ours for ours in (*correspondence(config.model), *extras)}
    errors = [f"{key} is missing" for key in wanted if key not in stored.names]
    errors += [
        f"{key} {list(stored.shape(key))} is not of a plain model, and cannot be exported"
        for key in stored.names
        if key not in wanted
    ]
    for key, ours in wanted.items():
        padded = key in (EMBEDDING, OUTPUT)
        if key in stored.names:
            rows, *rest = stored.shape(key)
            fits = rows >= ours.count if padded else rows == ours.count
            if not fits or tuple(rest) != ours.rest:
                errors.append(f"{key} has shape {[rows, *rest]}, not {[ours.count, *ours.rest]}")
            if stored.dtype(key) not in _DTYPES:
                errors.append(f"{key} is of dtype {stored.dtype(key)}")
    if errors:
        raise CheckpointError("\n".join(f"{checkpoint.path}: {error}" for error in errors[:20]))


def _sources(model: ModelConfig, stored: Stored, extras: Sequence[FusedTensor]) -> list[Source]:
    """Every Hugging Face tensor, made from ours when it is written."""
    shapes, held, sources = hf_shapes(model, extras), _Last(stored), []
    for ours in (*correspondence(model), *extras):
        for name in dict.fromkeys(part.name for part in ours.parts):
            if len(ours.parts) == 1:
                spans = stored.pieces(ours.key, ours.count)
                pieces = [_piece(stored.rows, ours.key, *span) for span in spans]
            else:
                spans = [(row, row + part.count) for row, part in ours.places(name)]
                pieces = [_piece(held.rows, ours.key, *span) for span in spans]
            sources.append(Source(name, stored.dtype(ours.key), shapes[name], pieces))
    return sources


def _piece(
    rows: Callable[[str, int, int], Tensor], key: str, first: int, stop: int
) -> Callable[[], Tensor]:
    return lambda: rows(key, first, stop)


class _Last:
    """The tensor asked for last, whole: the parts of a fused one are asked for one by one."""

    def __init__(self, stored: Stored) -> None:
        self._stored, self._key, self._tensor = stored, "", torch.empty(0)

    def rows(self, key: str, first: int, stop: int) -> Tensor:
        if key != self._key:
            self._tensor = torch.empty(0)
            self._key, self._tensor = key, self._stored.rows(key)
        return self._tensor[first:stop]


def _write_shards(folder: Path, sources: Sequence[Source], shard_bytes: int) -> list[str]:
    shards: list[list[Source]] = [[]]
    filled = 0
    for source in sources:
        if shards[-1] and filled + source.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(source)
        filled += source.nbytes
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as stream:
            write_tensors(stream, shard)
            stream.flush()
            os.fsync(stream.fileno())
    if count > 1:
        where = {one.name: name for name, shard in zip(names, shards, strict=True) for one in shard}
        size = sum(source.nbytes for source in sources)
        index = {"metadata": {"total_size": size}, "weight_map": where}
        write_file(folder / INDEX, json.dumps(index, indent=2) + "\n")
    sync_folder(folder)
    return names


def _tokenizer_folders(checkpoint: Checkpoint, config: Config) -> list[Path]:
    """Where the tokenizer may lie: with the run, with those it began from, with its data."""
    folders, began = [checkpoint.path.parent.parent], config.checkpoint.load
    while began:
        try:
            before = open_checkpoint(Path(began))
        except CheckpointError:  # gone since
            break
        folder = before.path.parent.parent
        began = "" if folder in folders else saved_config(before).checkpoint.load
        folders.append(folder)
    has_text = config.data.source == "tokens" and (config.data.path or config.data.mixture)
    return folders + ([held_out_folder(config.data)] if has_text else [])


def _table(
    checkpoint: Checkpoint, config: Config, stored: Stored, folders: Sequence[Path]
) -> dict[str, Any]:
    dtype = _DTYPES[stored.dtype(EMBEDDING)]
    table = config_table(config.model, config.train.seqlen, dtype, about(config, checkpoint.step))
    return {**table, **_special_tokens(folders)}


def _special_tokens(folders: Sequence[Path]) -> Mapping[str, Any]:
    """The numbers of special tokens, from the config.json of the model that was imported."""
    for folder in folders:
        if (folder / CONFIG).is_file():
            read = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            return {key: read[key] for key in _SPECIAL if key in read}
    # Their default would be the numbers of LLaMA's tokenizer.
    return dict.fromkeys(_SPECIAL)
