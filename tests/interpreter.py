"""Without a GPU, run Triton kernels as Python on CPU tensors; call before importing one."""

import os
from functools import wraps
from importlib import import_module
from types import FunctionType
from typing import Any

import torch


def interpret_without_gpu() -> None:
    """Set TRITON_INTERPRET=1, unless there is a GPU or it is set; child processes inherit it."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("TRITON_INTERPRET") == "1":
        _patch_the_language_once()


def _patch_the_language_once() -> None:
    """Patch Triton's language once a launch instead of in each function that a kernel calls.

    Triton 3.9 patches again in every function, which takes a third of the time. The patch stays in
    force until the launch ends, so repeating it changes nothing.
    """
    interpreter, language = map(import_module, ("triton.runtime.interpreter", "triton.language"))
    patch: Any = interpreter._patch_lang
    if not hasattr(interpreter, "_LangPatchScope") or hasattr(patch, "__wrapped__"):
        return

    @wraps(patch)
    def once(fn: FunctionType) -> Any:
        seen = fn.__globals__.values()
        used = [lang for lang in (language, language.core) if any(x is lang for x in seen)]
        if used and not any(language.core.is_builtin(lang.load) for lang in used):
            return interpreter._LangPatchScope()
        return patch(fn)

    interpreter._patch_lang = once
