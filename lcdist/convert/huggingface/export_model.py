"""Export a checkpoint as a Hugging Face folder: config.json, safetensors shards, tokenizer files.

Models with custom attention carry their code for transformers. Weights are read and written tensor
by tensor, in the stored dtype. At the end the folder is read back, config included, and compared
with the checkpoint.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcdist.checkpoint.manifest import Checkpoint, CheckpointError
from lcdist.checkpoint.read import open_checkpoint, saved_config
from lcdist.checkpoint.tensors import CheckpointTensors
from lcdist.checkpoint.verify import verify_checkpoint
from lcdist.config.schema import Config, ModelConfig
from lcdist.convert.ancestors import ancestors
from lcdist.convert.check import LogitDifference, compare
from lcdist.convert.huggingface.config import CONFIG, config_table
from lcdist.convert.huggingface.custom_attention import (
    inference_layers,
    method_parameters,
    training_table,
    with_remote_code,
)
from lcdist.convert.huggingface.import_model import open_model
from lcdist.convert.huggingface.names import (
    EMBEDDING,
    OUTPUT,
    FusedTensor,
    fused_tensors,
    hf_shapes,
)
from lcdist.convert.huggingface.safetensors import TensorStream, stream_tensors
from lcdist.convert.huggingface.tokenizer import copy_tokenizer
from lcdist.convert.huggingface.weights import INDEX, SINGLE
from lcdist.convert.streamed_forward import check_single_process
from lcdist.data.datasets.build import held_out_folder
from lcdist.distributed.mesh import start_world
from lcdist.model.init import LORA_PARAMS
from lcdist.utils.atomic import atomic_folder, check_free, write_file
from lcdist.utils.digests import write_sums
from lcdist.utils.progress import Progress, counter, silent

log = logging.getLogger(__name__)

SHARD_BYTES = 5 * 10**9
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class ExportResult:
    """Result of an export.

    Attributes:
        out: Hugging Face folder.
        shards: names of the safetensors files.
        difference: logits of the folder compared with the checkpoint's.
    """

    out: Path
    shards: Sequence[str]
    difference: LogitDifference


def export_model(
    path: Path | str, out: Path | str, shard_bytes: int = SHARD_BYTES, progress: Progress = silent
) -> ExportResult:
    """Write a checkpoint as the new Hugging Face folder `out`.

    Args:
        path: checkpoint, or run folder, which stands for its latest checkpoint.
        out: folder to create.
        shard_bytes: maximum bytes of tensors per file; a larger tensor gets a file of its own.
        progress: called with the bytes that are written.

    Raises:
        CheckpointError, ValueError: the checkpoint or an argument is wrong; nothing is written.
        ConversionError: the folder's logits differ from the checkpoint's; nothing is kept.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard size of {shard_bytes} bytes: must be at least 1")
    check_single_process()
    path, out = Path(path), Path(out)
    checkpoint = open_checkpoint(path)
    verify_checkpoint(checkpoint)
    config = saved_config(checkpoint)
    layers = inference_layers(config.model, config.attention)
    extras = method_parameters(config.model, layers)
    tensors = CheckpointTensors(checkpoint)
    _check_exportable(checkpoint, config, tensors, extras)
    streams = _tensor_streams(config.model, tensors, extras)
    folders = _tokenizer_folders(checkpoint, config)
    plain = _config_table(checkpoint, config, tensors, folders)
    code, table = with_remote_code(layers, plain)
    check_free(out, sum(stream.nbytes for stream in streams))
    start_world(config.parallel.timeout)
    with atomic_folder(out) as partial:
        names = _write_shards(partial, streams, shard_bytes, progress)
        write_file(partial / CONFIG, json.dumps(table, indent=2) + "\n")
        for name, text in code.items():
            write_file(partial / name, text)
        if not copy_tokenizer(folders, partial):
            log.warning("no tokenizer was found: %s has none", out)
        write_sums(partial)
        hf, weights = open_model(partial)
        difference = compare(hf, weights, config, tensors, progress)
    return ExportResult(out, names, difference)


def _check_exportable(
    checkpoint: Checkpoint,
    config: Config,
    tensors: CheckpointTensors,
    extras: Sequence[FusedTensor],
) -> None:
    """Raise CheckpointError listing the weights that do not match the configuration's model."""
    if any(LORA_PARAMS in key for key in tensors.names):
        raise CheckpointError(
            f"{checkpoint.path} has LoRA adapters: merge them into the weights first "
            "(lcdist convert merge), then export the result"
        )
    model = config.model
    if model.hidden_size % model.nheads:
        raise ValueError(
            f"model.hidden_size = {model.hidden_size} is not a multiple of model.nheads = "
            f"{model.nheads}: transformers cannot load such a model"
        )
    expected = {ours.key: ours for ours in (*fused_tensors(config.model), *extras)}
    errors = [f"{key} is missing" for key in expected if key not in tensors.names]
    errors += [
        f"{key} {list(tensors.shape(key))} is not a tensor of the model, and cannot be exported"
        for key in tensors.names
        if key not in expected
    ]
    for key, ours in expected.items():
        padded = key in (EMBEDDING, OUTPUT)
        if key in tensors.names:
            rows, *rest = tensors.shape(key)
            fits = rows >= ours.count if padded else rows == ours.count
            if not fits or tuple(rest) != ours.rest:
                errors.append(f"{key} has shape {[rows, *rest]}, not {[*ours.shape]}")
            if tensors.dtype(key) not in _DTYPES:
                errors.append(
                    f"{key} has dtype {tensors.dtype(key)}; exportable are float32 and bfloat16"
                )
    if errors:
        raise CheckpointError("\n".join(f"{checkpoint.path}: {error}" for error in errors[:20]))


def _tensor_streams(
    model: ModelConfig, tensors: CheckpointTensors, extras: Sequence[FusedTensor]
) -> list[TensorStream]:
    """Return every Hugging Face tensor as a stream that reads ours when it is written."""
    shapes, cache, streams = hf_shapes(model, extras), _TensorCache(tensors), []
    for ours in (*fused_tensors(model), *extras):
        for name in dict.fromkeys(part.name for part in ours.parts):
            if len(ours.parts) == 1:
                spans = tensors.pieces(ours.key, ours.count)
                pieces = [_row_reader(tensors.rows, ours.key, *span) for span in spans]
            else:
                spans = [(row, row + part.count) for row, part in ours.parts_from(name)]
                pieces = [_row_reader(cache.rows, ours.key, *span) for span in spans]
            streams.append(TensorStream(name, tensors.dtype(ours.key), shapes[name], pieces))
    return streams


def _row_reader(
    rows: Callable[[str, int, int], Tensor], key: str, first: int, stop: int
) -> Callable[[], Tensor]:
    return lambda: rows(key, first, stop)


class _TensorCache:
    """Holds the tensor read last, whole: the parts of a fused tensor are written one by one."""

    def __init__(self, tensors: CheckpointTensors) -> None:
        self._tensors, self._key, self._tensor = tensors, "", torch.empty(0)

    def rows(self, key: str, first: int, stop: int) -> Tensor:
        if key != self._key:
            self._tensor = torch.empty(0)
            self._key, self._tensor = key, self._tensors.rows(key)
        return self._tensor[first:stop]


def _write_shards(
    folder: Path, streams: Sequence[TensorStream], shard_bytes: int, progress: Progress
) -> list[str]:
    """Write the tensors in order, with an index if there are several files; return the names."""
    shards: list[list[TensorStream]] = [[]]
    filled = 0
    for stream in streams:
        if shards[-1] and filled + stream.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(stream)
        filled += stream.nbytes
    files = len(shards)
    names = [f"model-{i:05d}-of-{files:05d}.safetensors" for i in range(1, files + 1)]
    names = names if files > 1 else [SINGLE]
    count = counter("writing", sum(stream.nbytes for stream in streams), progress)
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            stream_tensors(file, shard, count)
    if files > 1:
        file_of = {
            stream.name: name for name, shard in zip(names, shards, strict=True) for stream in shard
        }
        size = sum(stream.nbytes for stream in streams)
        index = {"metadata": {"total_size": size}, "weight_map": file_of}
        write_file(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return names


def _tokenizer_folders(checkpoint: Checkpoint, config: Config) -> list[Path]:
    """Return folders that may hold the tokenizer: the run's, its ancestors', the data's."""
    found = [checkpoint, *ancestors(config)]
    folders = [each.path.parent.parent for each in found]
    has_text = config.data.source == "tokens" and (config.data.path or config.data.mixture)
    return folders + ([held_out_folder(config.data)] if has_text else [])


def _config_table(
    checkpoint: Checkpoint, config: Config, tensors: CheckpointTensors, folders: Sequence[Path]
) -> dict[str, Any]:
    dtype = _DTYPES[tensors.dtype(EMBEDDING)]
    record = training_table(config, checkpoint.step)
    table = config_table(config.model, config.train.seqlen, dtype, record)
    return {**table, **_special_tokens(folders)}


def _special_tokens(folders: Sequence[Path]) -> Mapping[str, Any]:
    """Return the ids of special tokens, from the config.json of the imported model."""
    for folder in folders:
        if (folder / CONFIG).is_file():
            table = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            return {key: table[key] for key in _SPECIAL_TOKENS if key in table}
    # Missing keys would mean the ids of LLaMA's tokenizer.
    return dict.fromkeys(_SPECIAL_TOKENS)
