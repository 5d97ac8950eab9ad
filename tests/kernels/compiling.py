"""Compiles kernels for a GPU that is not there: launches in a block are compiled, never run.

What the interpreter lets pass and the compiler does not (a constant that is none, a type that
changes in a loop, more shared memory than a GPU has) shows on a CPU. It needs Triton kernels that
are not interpreted: a process without TRITON_INTERPRET.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from lcdist_kernels import triton_common

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# Bytes of shared memory a block may have, by compute capability.
SHARED = {80: 163 * 1024, 90: 227 * 1024}


@contextmanager
def compiled_for(capability: int) -> Iterator[list[Any]]:
    """Within, a launch on CPU tensors compiles its kernel for sm_`capability`; results are listed.

    Tensors that the launch should have filled stay as they were.
    """
    made: list[Any] = []
    target = GPUTarget("cuda", capability, 32)

    def compile_one(self: Any, *args: Any, grid: Any, warmup: bool, **words: Any) -> None:
        made.append(_compile(self, args, words, target))

    with (
        patch.object(triton.JITFunction, "run", compile_one),
        patch.object(triton_common, "unsupported_reason", lambda x: None),
        patch.object(torch.cuda, "device", lambda device: nullcontext()),
        patch.object(torch.cuda, "get_device_capability", lambda device: (capability // 10, 0)),
    ):
        yield made


def _compile(kernel: Any, args: tuple, words: dict[str, Any], target: GPUTarget) -> Any:
    options = {name: words.pop(name) for name in ("num_warps", "num_stages") if name in words}
    values = dict(zip(kernel.arg_names, args, strict=False)) | words
    assert set(values) == set(kernel.arg_names), "a launch names every argument"
    signature, constants, hints = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1) or value is None:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        signature[parameter.name] = _type_of(value)
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0):
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=target, options=options)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"
