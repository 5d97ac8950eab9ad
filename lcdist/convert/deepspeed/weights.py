"""Open the fp32 weights of a DeepSpeed checkpoint: the ranks' own files, or a universal one."""

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lcdist.convert.deepspeed.files import load_file
from lcdist.convert.deepspeed.flat import FlatTensor, Segment
from lcdist.convert.deepspeed.zero import OPTIMIZER_FILES, read_zero
from lcdist.convert.huggingface.safetensors import DTYPE_NAMES
from lcdist.convert.huggingface.weights import Weights

_UNIVERSAL = "zero"
_LATEST = ("latest", "latest_universal")
# Wrappers such as DistributedDataParallel put it before every name.
_WRAPPER = "module."
_LOST = (
    "not taken over: Adam's moments, loss scale, learning-rate schedule, step, order of the data "
    "and random states; a run that loads it starts at step 0"
)
_Shapes = Mapping[str, tuple[int, ...]]


def open_deepspeed(folder: Path, expected: _Shapes) -> tuple[Weights, str]:
    """Open a DeepSpeed checkpoint of a Hugging Face model.

    Args:
        folder: DeepSpeed's folder with the file `latest`, the folder of one tag in it, or a
            universal checkpoint.
        expected: shape of every tensor that the model's config.json implies.

    Returns:
        The weights under Hugging Face's names, and a sentence on what they are and what is lost.

    Raises:
        ValueError: there is no checkpoint, or a file of it is missing, damaged or refused.
    """
    folder = _find(folder)
    if (folder / _UNIVERSAL).is_dir():
        tensors = _read_universal(folder, expected)
        origin = f"universal checkpoint {folder.name}"
    else:
        zero = read_zero(folder)
        tensors = _without_wrapper(zero.tensors)
        origin = f"ZeRO-{zero.stage} checkpoint {folder.name} of {zero.world_size} ranks"
    return Weights(folder, tensors), f"fp32 weights of DeepSpeed's {origin}; {_LOST}"


def _is_checkpoint(folder: Path) -> bool:
    return (folder / _UNIVERSAL).is_dir() or any(folder.glob(OPTIMIZER_FILES))


def _find(folder: Path) -> Path:
    """Return the folder of the checkpoint that `folder` is or that its file `latest` names."""
    if _is_checkpoint(folder):
        return folder
    pointer = next((folder / name for name in _LATEST if (folder / name).is_file()), None)
    if pointer is None:
        raise ValueError(
            f"{folder} is no DeepSpeed checkpoint: it has neither 'latest' nor {OPTIMIZER_FILES} "
            f"nor {_UNIVERSAL}/ (a run without ZeRO has none: use save_pretrained)"
        )
    tag = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if Path(tag).name != tag or not _is_checkpoint(folder / tag):
        raise ValueError(
            f"{pointer} names {tag!r}, which is no folder with {OPTIMIZER_FILES} or {_UNIVERSAL}/: "
            "give the checkpoint's folder itself"
        )
    return folder / tag


def _without_wrapper(tensors: Mapping[str, FlatTensor]) -> dict[str, FlatTensor]:
    """Remove the prefix of a wrapper, if every name has it."""
    wrapped = all(name.startswith(_WRAPPER) for name in tensors)
    return {name.removeprefix(_WRAPPER * wrapped): tensor for name, tensor in tensors.items()}


def _read_universal(folder: Path, expected: _Shapes) -> dict[str, FlatTensor]:
    """Open `zero/NAME/fp32.pt` for every parameter NAME; each is mapped again when it is read."""
    remedy = "where you trust it, convert the checkpoint again with ds_to_universal.py"

    def load(file: Path) -> Tensor:
        content = load_file(file, remedy)
        # Stage 3 stores the tensor alone.
        param = content.get("param") if isinstance(content, dict) else content
        if not isinstance(param, Tensor) or param.dtype not in DTYPE_NAMES:
            raise ValueError(f"{file} has no floating-point tensor 'param': {remedy}")
        return param

    tensors, untrained = {}, set()
    for file in sorted((folder / _UNIVERSAL).glob("*/fp32.pt")):
        param, name = load(file), file.parent.name
        shape = tuple(param.shape)
        # Stage 3 is flat in a universal checkpoint.
        whole = expected.get(name.removeprefix(_WRAPPER), shape)
        if len(shape) == 1 and math.prod(whole) == param.numel():
            shape = whole
        segment = Segment(lambda file=file: load(file).flatten(), 0, param.numel())
        tensors[name] = FlatTensor(DTYPE_NAMES[param.dtype], shape, (segment,))
        if not (file.parent / "exp_avg.pt").is_file():
            untrained.add(name)
    if not tensors:
        raise ValueError(f"{folder / _UNIVERSAL} has no PARAMETER/fp32.pt: {remedy}")
    # Buffers and second names of tied weights, which the converter copies from the module in its
    # own precision.
    extra = {name for name in untrained if name.removeprefix(_WRAPPER) not in expected}
    kept = {name: tensor for name, tensor in tensors.items() if name not in extra}
    return _without_wrapper(kept)
