"""Softmax attention of one block by libraries: cuDNN and FlashAttention 2, 3 and 4.

A block is whole (every query sees every key) or causal (as many queries as keys, query i sees keys
0 to i). Forward returns (out, lse) and backward takes both, so with those of the whole row it gives
a block's exact share of the gradients, as `tiled.full_bwd` does: a library makes the weights again
from lse, and delta from out and dout.

    name    operators                                            layout          lse
    cudnn   torch's _scaled_dot_product_cudnn_attention          `[b, h, s, d]`  `[b, h, s, 1]`
    fa2     torch's _scaled_dot_product_flash_attention          `[b, h, s, d]`  `[b, h, s]`
    fa3     flash_attn_interface (arXiv:2407.08608)              `[b, s, h, d]`  `[b, h, s]`
    fa4     flash_attn.cute.interface (arXiv:2603.05451)         `[b, s, h, d]`  `[b, h, s]`

All take fewer key heads than query heads as they are, so nothing is expanded; every lse is fp32 and
a natural logarithm. A library is found by the functions it offers, not by its version.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

# A library's loads are 16 bytes wide.
ALIGNMENT = 16


class Library(NamedTuple):
    """Attention of a library, for half precision on CUDA.

    Tensors are as in `tiled`; causal and softmax_scale follow them.

    Attributes:
        title: name in messages.
        fwd: (q, k, v, causal, softmax_scale) -> (out, lse).
        bwd: (dout, q, k, v, out, lse, causal, softmax_scale) -> (dq, dk, dv).
    """

    title: str
    fwd: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
    bwd: Callable[..., tuple[Tensor, ...]]


class LibraryFacts(NamedTuple):
    """Describe a library that may not be installed.

    Attributes:
        title: name in messages.
        least, greatest: compute capabilities that it is built for.
        module: what it is imported from; None: torch.
        install: what to install where the module is missing.
    """

    title: str
    least: int
    greatest: int
    module: str | None = None
    install: str = ""


LIBRARIES = {
    "cudnn": LibraryFacts("cuDNN through torch", 8, 99),
    "fa2": LibraryFacts("FlashAttention-2 through torch", 8, 99),
    "fa3": LibraryFacts("FlashAttention-3", 9, 9, "flash_attn_interface", "flash_attn_3"),
    "fa4": LibraryFacts("FlashAttention-4", 9, 11, "flash_attn.cute.interface", "flash-attn-4"),
}


@cache
def find_library(name: str) -> Library | str:
    """Return a library, or why there is none: one of `LIBRARIES`."""
    facts, make = LIBRARIES[name], _MAKERS[name]
    if facts.module is None:
        return make(facts.title)
    try:
        # Of a module inside a package that is missing, find_spec says so by raising.
        if find_spec(facts.module) is None:
            raise ModuleNotFoundError
        return make(facts.title, import_module(facts.module))
    except ModuleNotFoundError as error:
        missing = error.name or facts.module
        return f"the module {missing} is not installed; install {facts.install}"
    except Exception as error:
        # Packages built on a compiler raise classes of their own.
        return f"{facts.module} is installed but cannot be used: {error}"


def _aligned(x: Tensor) -> Tensor:
    """Return x `[b, s, h, d]` as libraries take it: tokens outside heads, on 16-byte borders."""
    strides = x.stride()
    steps = [*strides[:3], x.storage_offset()]
    fits = all(step * x.element_size() % ALIGNMENT == 0 for step in steps)
    return x if fits and strides[3] == 1 and strides[1] >= strides[2] else x.contiguous()


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """Return views `[b, h, s, d]` of tensors `[b, s, h, d]`."""
    return [x.transpose(1, 2) for x in tensors]


def _unused(q: Tensor) -> Tensor:
    """Return what stands for the state of a random generator, read for dropout alone."""
    return q.new_empty(0, dtype=torch.int64)


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    """Select x's device: FlashAttention launches on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _cudnn(title: str) -> Library:
    """Return cuDNN's attention, for torch 2.11 and later.

    torch keeps cuDNN's plans by the shapes and strides of q, k and v alone
    (aten/src/ATen/native/cudnn/MHA.cpp), so out, dout and lse come in one layout: a plan made for
    other strides would read the wrong places.
    """

    def fwd(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        qkv = _heads_first(*(_aligned(x) for x in (q, k, v)))
        attend = torch.ops.aten._scaled_dot_product_cudnn_attention
        out, lse, *_ = attend(*qkv, None, True, 0.0, causal, False, scale=scale)
        return out.transpose(1, 2), lse.reshape(lse.shape[:3])

    def bwd(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        causal: bool, scale: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        qkv = _heads_first(*(_aligned(x) for x in (q, k, v)))
        dout, out = _heads_first(dout.contiguous(), out.contiguous())
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout, *qkv, out, lse.contiguous()[..., None], _unused(q), _unused(q), None, None, None,
            q.shape[1], k.shape[1], 0.0, causal, scale=scale,
        )  # fmt: skip
        return tuple(_heads_first(*grads))

    return Library(title, fwd, bwd)


def _flash_2(title: str) -> Library:
    """Return the FlashAttention-2 that comes with torch."""

    def fwd(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        qkv = _heads_first(*(_aligned(x) for x in (q, k, v)))
        attend = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse, *_ = attend(*qkv, 0.0, causal, False, scale=scale)
        return out.transpose(1, 2), lse

    def bwd(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        causal: bool, scale: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        qkv = _heads_first(*(_aligned(x) for x in (q, k, v)))
        dout, out = _heads_first(_aligned(dout), _aligned(out))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dout, *qkv, out, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, causal,
            _unused(q), _unused(q), scale=scale,
        )  # fmt: skip
        return tuple(_heads_first(*grads))

    return Library(title, fwd, bwd)


def _flash_forward(
    forward: Callable[..., tuple[Tensor, ...]], **options: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the forward of FlashAttention 3 or 4 from the library's function."""

    def fwd(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = (_aligned(x) for x in (q, k, v))
        with _device_of(q):
            out, lse, *_ = forward(q, k, v, softmax_scale=scale, causal=causal, **options)
        return out, lse

    return fwd


def _flash_3(title: str, module: ModuleType) -> Library:
    """Return FlashAttention-3; some releases name the backward's argument is_causal."""
    backward = module._flash_attn_backward
    causal_name = "is_causal" if "is_causal" in _argument_names(backward) else "causal"

    def bwd(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        causal: bool, scale: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        dout, q, k, v, out = (_aligned(x) for x in (dout, q, k, v, out))
        grads = {name: torch.empty_like(x) for name, x in {"dq": q, "dk": k, "dv": v}.items()}
        with _device_of(q):
            backward(
                dout, q, k, v, out, lse.contiguous(), softmax_scale=scale, **grads,
                **{causal_name: causal}, **_deterministic(),
            )  # fmt: skip
        return tuple(grads.values())

    return Library(title, _flash_forward(module._flash_attn_forward), bwd)


def _flash_4(title: str, module: ModuleType) -> Library:
    """Return FlashAttention-4, which compiles a kernel at its first call."""
    backward = module._flash_attn_bwd

    def bwd(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        causal: bool, scale: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        dout, q, k, v, out = (_aligned(x) for x in (dout, q, k, v, out))
        with _device_of(q):
            dq, dk, dv, *_ = backward(
                q, k, v, out, dout, lse.contiguous(), softmax_scale=scale, causal=causal,
                **_deterministic(),
            )  # fmt: skip
        return dq, dk, dv

    return Library(title, _flash_forward(module._flash_attn_fwd, return_lse=True), bwd)


_MAKERS: dict[str, Callable[..., Library]] = {
    "cudnn": _cudnn,
    "fa2": _flash_2,
    "fa3": _flash_3,
    "fa4": _flash_4,
}


def _deterministic() -> dict[str, bool]:
    """Return the keyword argument for gradients that are summed in a fixed order, if asked for."""
    return {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}


def _argument_names(function: Callable[..., object]) -> set[str]:
    """Return the names of a function's arguments, also of an operator made by torch.library."""
    operator = getattr(function, "_opoverload", None)
    if operator is not None:
        return {argument.name for argument in operator._schema.arguments}
    return set(inspect.signature(function).parameters)
