"""Open DeepSpeed's files without running anything that they hold.

They are pickled. torch reads them with `weights_only`, which builds tensors and plain containers
and calls nothing else. The few classes that DeepSpeed puts beside the tensors are read as stand-ins
without behaviour; a file that names any other is refused.
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.serialization import safe_globals


class _Inert:
    """Takes the place of a DeepSpeed class: holds attributes, does nothing."""


_STAND_INS: tuple[tuple[Any, str], ...] = (
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
    # An enumeration of whole numbers.
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
)


def load_file(file: Path, remedy: str) -> Any:
    """Return the content of `file`; its tensors are mapped, not read.

    Args:
        file: written by torch.save.
        remedy: what the user can do if the file holds more than `weights_only` reads.

    Raises:
        ValueError: the file is missing, damaged or holds other classes.
    """
    try:
        with safe_globals([*_STAND_INS]):
            # Files in torch's format before 1.6 cannot be mapped.
            return torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: copy the whole checkpoint") from None
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        held = named[1] if named else "an object"
        raise ValueError(
            f"{file} holds {held}, which could run code, and was not read: {remedy}"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} is truncated or damaged ({reason}): copy it again") from error


def load_table(file: Path, remedy: str) -> dict[str, Any]:
    """Return the dictionary in `file`; arguments and errors as of `load_file`."""
    content = load_file(file, remedy)
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not DeepSpeed's, it holds no dictionary: {remedy}")
    return content
