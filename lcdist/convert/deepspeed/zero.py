"""Find each parameter in the files that DeepSpeed's ranks write under ZeRO 1, 2 and 3.

Every rank has its part of the fp32 weights as flat vectors. Stages 1 and 2 cut the concatenated
parameters of each optimizer group into one part for each rank. Stage 3 cuts every parameter into
equal parts and pads the last; each rank concatenates its parts. The layout is the one that
DeepSpeed's `utils/zero_to_fp32.py` (0.19.8) undoes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lcdist.convert.deepspeed.files import load_table
from lcdist.convert.deepspeed.flat import FlatTensor, Segment, cut
from lcdist.convert.huggingface.safetensors import DTYPE_NAMES

OPTIMIZER_FILES = "*_optim_states.pt"
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_Shape = tuple[int, ...]


@dataclass(frozen=True)
class ZeroCheckpoint:
    """Parameters by DeepSpeed's name, stage, and number of ranks that share them."""

    tensors: Mapping[str, FlatTensor]
    stage: int
    world_size: int


def read_zero(folder: Path) -> ZeroCheckpoint:
    """Open the folder of one tag, such as global_step100.

    Raises:
        ValueError: a file is missing, damaged or refused, or the layout is another one.
    """
    remedy = (
        f"where you trust it, run 'python zero_to_fp32.py . OUT --safe_serialization' in "
        f"{folder.parent}, copy the model's config.json into OUT, and import OUT"
    )
    files = _optimizer_files(folder, remedy)
    states: list[Mapping[str, Any]] = []
    for file in files:
        state = load_table(file, remedy).get("optimizer_state_dict")
        if not isinstance(state, dict) or "zero_stage" not in state:
            raise ValueError(f"{file} has no state of a ZeRO optimizer: {remedy}")
        states.append(state)
    stage, count = int(states[0]["zero_stage"]), states[0]["partition_count"]
    world_size = max(count) if isinstance(count, list) else count
    if world_size != len(files):
        raise ValueError(
            f"{folder} has {len(files)} files {OPTIMIZER_FILES}, and {world_size} ranks wrote it: "
            "copy the whole checkpoint into an empty folder"
        )
    if stage == 3:
        names = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world_size)]
    else:
        names = ["mp_rank_00_model_states.pt"]
    models = [load_table(folder / name, remedy) for name in names]
    try:
        tensors = _untrained(models, stage)
        if stage == 3:
            groups = [state["fp32_flat_groups"] for state in states]
            tensors |= split_each(models[0]["param_shapes"], groups)
        else:
            groups = [state["single_partition_of_fp32_groups"] for state in states]
            gaps = states[0].get("param_alignment_paddings")
            tensors |= split_together(models[0]["param_shapes"], groups, gaps)
    except (KeyError, LayoutError) as error:
        raise ValueError(f"{folder} has an unknown layout ({error}): {remedy}") from error
    return ZeroCheckpoint(tensors, stage, world_size)


class LayoutError(Exception):
    """Sizes that contradict each other."""


def _optimizer_files(folder: Path, remedy: str) -> list[Path]:
    """Return the file of each rank, in the order of ranks."""
    ranks = {}
    for file in folder.glob(OPTIMIZER_FILES):
        match = _OPTIMIZER_FILE.fullmatch(file.name)
        if match is None or int(match[2]):
            raise ValueError(
                f"{file} is of a model that was split or has experts, which this import does not "
                f"join: {remedy}"
            )
        ranks[int(match[1])] = file
    missing = set(range(max(ranks) + 1)) - {*ranks}
    if missing:
        raise ValueError(f"{folder}: {OPTIMIZER_FILES} of rank {min(missing)} is missing")
    return [ranks[rank] for rank in sorted(ranks)]


def _whole(vector: Tensor) -> Segment:
    return Segment(lambda: vector, 0, vector.numel())


def _flat(shape: Sequence[int], vectors: Sequence[Tensor], segments: list[Segment]) -> FlatTensor:
    return FlatTensor(DTYPE_NAMES[vectors[0].dtype], tuple(shape), tuple(segments))


def split_together(
    shapes: Sequence[Mapping[str, _Shape]],
    ranks: Sequence[Sequence[Tensor]],
    gaps: Sequence[Sequence[int]] | None,
) -> dict[str, FlatTensor]:
    """Place the parameters of stages 1 and 2.

    Args:
        shapes: shape of each parameter by name, for each optimizer group.
        ranks: vector of each group, for each rank.
        gaps: elements of padding after each parameter, for each group.
    """
    found = {}
    for number, group in enumerate(shapes):
        vectors = [rank[number] for rank in ranks]
        segments, first = [_whole(vector) for vector in vectors], 0
        for index, (name, shape) in enumerate(group.items()):
            size = math.prod(shape)
            found[name] = _flat(shape, vectors, cut(segments, first, size))
            first += size + (gaps[number][index] if gaps else 0)
        # The end is padded to a multiple of twice the ranks.
        held, align = sum(segment.count for segment in segments), 2 * len(ranks)
        if math.ceil(held / align) != math.ceil(first / align):
            raise LayoutError(f"group {number} has {held} elements, its parameters {first}")
    return found


def split_each(
    shapes: Sequence[Mapping[str, _Shape]], ranks: Sequence[Sequence[Tensor]]
) -> dict[str, FlatTensor]:
    """Place the parameters of stage 3; arguments as of `split_together`."""
    found, first = {}, 0
    segments = [[_whole(vector) for vector in vectors] for vectors in ranks]
    for name, shape in (pair for group in shapes for pair in group.items()):
        part = math.ceil(math.prod(shape) / len(ranks))
        pieces = [piece for rank in segments for piece in cut(rank, first, part)]
        found[name] = _flat(shape, ranks[0], pieces)
        first += part
    for number, rank in enumerate(segments):
        held = sum(segment.count for segment in rank)
        if held != first:
            raise LayoutError(f"rank {number} has {held} elements, its parameters {first}")
    return found


def _untrained(models: Sequence[Mapping[str, Any]], stage: int) -> dict[str, FlatTensor]:
    """Return frozen parameters: whole in the module, or under stage 3 a part for each rank."""
    model = models[0]
    if stage == 3:
        shapes = model.get("frozen_param_shapes") or {}
        parts = {
            name: [each["frozen_param_fragments"][name].flatten() for each in models]
            for name in shapes
        }
    else:
        module = model["module"]
        # Tied weights have two names.
        known = {*model["buffer_names"], *model["shared_params"]}
        known.update(*model["param_shapes"])
        shapes = {name: value.shape for name, value in module.items() if name not in known}
        parts = {name: [module[name].flatten()] for name in shapes}
    return {
        name: _flat(shape, parts[name], [_whole(part) for part in parts[name]])
        for name, shape in shapes.items()
    }
