"""Choice of the library that computes whole and causal blocks, or of our kernels."""

from functools import cache

import torch
from torch import Tensor

from lcdist_kernels.common import log_choice
from lcdist_kernels.full.library import LIBRARIES, Library, find_library
from lcdist_kernels.full.self_test import self_test

HALF = (torch.bfloat16, torch.float16)

# By compute capability, the fastest first; no entry: our kernels.
#   8: FlashAttention-2 is written for it (arXiv:2307.08691).
#   9: cuDNN forward / backward 635 / 543 TFLOP/s on an H100 at 32,768 tokens
#      (kernels/bench/results/full.csv, 2026-11-27). FlashAttention-3 is unmeasured here; its paper
#      has it beside cuDNN for causal heads of 128 (arXiv:2407.08608, section 4). FlashAttention-4
#      is written for capability 10.
#   10, 11: FlashAttention-4 is up to 1.3 times as fast as cuDNN 9.13 on a B200 (arXiv:2603.05451,
#      abstract). Unmeasured here.
RANKING = {
    8: ("fa2", "cudnn"),
    9: ("cudnn", "fa3", "fa4", "fa2"),
    10: ("fa4", "cudnn", "fa2"),
    11: ("fa4", "cudnn", "fa2"),
    12: ("cudnn", "fa2"),
}

FORCED = ("cudnn", "fa3", "fa4")
"""Values of `impl` that name a library."""


def choose_library(x: Tensor, what: str) -> Library | None:
    """Return the fastest library that takes tensors like x `[b, s, h, d]`, or None.

    A library that is installed but fails its self-test is passed over. The choice is logged once;
    what: the operator's name in the log.
    """
    if torch.are_deterministic_algorithms_enabled():
        return None
    capability = capability_of(x)
    for name in RANKING.get(capability, ()):
        if refusal(name, x) is not None:
            continue
        library = find_library(name)
        wrong = tested(name, x.device, x.dtype, x.shape[3])
        if wrong is not None:
            # Missing is no news, as no one asked for it.
            if isinstance(library, Library) or "not installed" not in library:
                log_choice(f"{LIBRARIES[name].title} is passed over: {wrong}")
            continue
        assert isinstance(library, Library)
        log_choice(
            f"{what}: {library.title} for whole and causal blocks, the fastest for compute "
            f"capability {capability} that is there and passes its self-test"
        )
        return library
    return None


def force_library(name: str, x: Tensor) -> Library:
    """Return the library `name`, one of `FORCED`, for tensors like x `[b, s, h, d]`.

    Raises:
        ValueError: it is missing, does not take x or fails its self-test; the message says which.
    """
    wrong = refusal(name, x)
    if wrong is None and name == "cudnn" and torch.are_deterministic_algorithms_enabled():
        wrong = "cuDNN sums gradients in no fixed order and deterministic algorithms are asked for"
    wrong = wrong or tested(name, x.device, x.dtype, x.shape[3])
    if wrong is not None:
        raise ValueError(f"impl = '{name}': {wrong}; or use impl = 'auto' or 'triton'")
    library = find_library(name)
    assert isinstance(library, Library)
    return library


def refusal(name: str, x: Tensor) -> str | None:
    """Return why a library does not take tensors like x `[b, s, h, d]`, or None."""
    facts, capability = LIBRARIES[name], capability_of(x)
    if not capability:
        return f"{facts.title} runs on CUDA, the tensors are on {x.device}"
    if not facts.least <= capability <= facts.greatest:
        span = f"{facts.least} to {facts.greatest}"
        return f"{facts.title} is for compute capability {span}, this is {capability}"
    if x.dtype not in HALF:
        return f"{facts.title} takes bf16 and fp16, the tensors are {x.dtype}"
    if x.shape[3] % 8 or x.shape[3] > 256:
        return f"{facts.title} takes head_dim up to 256, a multiple of 8, not {x.shape[3]}"
    return None


def capability_of(x: Tensor) -> int:
    """Return the major compute capability of x's device, 0 for a CPU."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0


@cache
def tested(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why a library cannot be used, or None; tested once for equal arguments."""
    library = find_library(name)
    if not isinstance(library, Library):
        return library
    wrong = self_test(library, device, dtype, head_dim)
    about = f"{str(dtype).removeprefix('torch.')}, head_dim {head_dim}"
    return wrong and f"{library.title} fails its self-test ({about}): {wrong}"
