"""Without a GPU, run Triton kernels as Python on CPU tensors; call before importing one."""

import os
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from operator import attrgetter
from types import FunctionType
from typing import Any

import numpy as np
import torch


def interpret_without_gpu() -> None:
    """Set TRITON_INTERPRET=1, unless there is a GPU or it is set; child processes inherit it."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    interpreter, language = map(import_module, ("triton.runtime.interpreter", "triton.language"))
    if not hasattr(interpreter._get_np_dtype, "__wrapped__"):
        _patch_the_language_once(interpreter, language)
        _work_out_types_once(interpreter, language.core)
        _round_to_bfloat16(interpreter, language)


def _patch_the_language_once(interpreter: Any, language: Any) -> None:
    """Patch Triton's language once a launch instead of in each function that a kernel calls.

    Triton 3.9 patches again in every function, which takes a third of the time. The patch stays in
    force until the launch ends, so repeating it changes nothing.
    """
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch = interpreter._patch_lang
    languages: dict[FunctionType, list[Any]] = {}

    @wraps(patch)
    def once(fn: FunctionType) -> Any:
        used = languages.get(fn)
        if used is None:
            seen = fn.__globals__.values()
            used = [lang for lang in (language, language.core) if any(x is lang for x in seen)]
            languages[fn] = used
        if used and not any(language.core.is_builtin(lang.load) for lang in used):
            return interpreter._LangPatchScope()
        return patch(fn)

    interpreter._patch_lang = once


def _work_out_types_once(interpreter: Any, core: Any) -> None:
    """Keep what Triton's interpreter works out from types alone, and leave overflow checks out.

    That takes most of the interpreter's time. A type's name tells it from all others. Compiled
    kernels check integers for overflow only where debugging is on.
    """
    name = attrgetter("name")
    rules = type(interpreter.interpreter_semantic)
    rules.computation_type_impl = _kept(
        rules.computation_type_impl,
        lambda _, a, a_is_scalar, b, *more: (a.name, a_is_scalar, b.name, *more),
    )
    interpreter._get_np_dtype = _kept(interpreter._get_np_dtype, name)
    _share_attributes_of_types(core.block_type)
    _share_attributes_of_tensors(core.tensor)
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )


def _round_to_bfloat16(interpreter: Any, language: Any) -> None:
    """Convert fp32 to bf16 by rounding to the nearest, ties to even, as hardware does.

    Triton's interpreter cuts the lower bits off, which doubles the error of every conversion, and
    takes many steps on numpy arrays for it.
    """
    convert = interpreter._convert_float

    @wraps(convert)
    def converted(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) == (language.bfloat16, language.float32):
            return data.astype(np.uint32) << 16
        if (source, target) != (language.float32, language.bfloat16):
            return convert(data, source, target, rounding_mode)
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        # The carry of a NaN could turn it into infinity or zero.
        return np.where(np.isnan(data), (bits >> 16) | 0x40, rounded).astype(np.uint16)

    interpreter._convert_float = converted


def _kept(compute: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., Any]:
    """Return `compute` with its results kept by the key of its arguments."""
    results: dict[Any, Any] = {}

    @wraps(compute)
    def kept(*arguments: Any) -> Any:
        this = key(*arguments)
        if this not in results:
            results[this] = compute(*arguments)
        return results[this]

    return kept


def _share_attributes_of_types(block_type: Any) -> None:
    """Make types of blocks from the attributes of an equal one."""
    _share_attributes(
        block_type,
        key=lambda element_ty, shape: (element_ty.name, *shape),
        own=lambda element_ty, shape: {"element_ty": element_ty},
    )


def _share_attributes_of_tensors(tensor: Any) -> None:
    """Make tensors from the attributes of one of the same type, but for handle and type."""
    _share_attributes(
        tensor,
        key=lambda handle, type: type.name,
        own=lambda handle, type: {"handle": handle, "type": type},
    )


def _share_attributes(
    kind: Any, key: Callable[..., Any], own: Callable[..., dict[str, Any]]
) -> None:
    """Make objects from the attributes of an earlier one with the same key, but for their own."""
    make, known = kind.__init__, {}

    @wraps(make)
    def init(self: Any, *arguments: Any) -> None:
        this = key(*arguments)
        if this not in known:
            make(self, *arguments)
            known[this] = vars(self).copy()
        else:
            self.__dict__.update(known[this] | own(*arguments))

    kind.__init__ = init
