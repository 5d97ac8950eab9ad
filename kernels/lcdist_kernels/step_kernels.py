"""The implementations of what stands around attention in a training step: one choice a process.

    auto    our kernels on CUDA, plain torch elsewhere; apex's weight gradient where torch has no
            product that adds to fp32
    own     the same without apex
    apex    apex's weight gradient, norm and AdamW; an error where one of them is missing
    te      Transformer Engine's norm, ours for the rest; an error where it is missing
    torch   plain torch everywhere

Under DeepSpeed, AdamW and weight gradients are torch's whatever is chosen. It is said once, before
a model is built, and read when an operator runs.
"""

from typing import Literal, cast

StepKernels = Literal["auto", "own", "apex", "te", "torch"]
CHOICES: tuple[StepKernels, ...] = ("auto", "own", "apex", "te", "torch")


class _Chosen:
    """The choice of this process."""

    kernels: StepKernels = "auto"


def choose_step_kernels(kernels: str) -> None:
    """Set the choice. Raises ValueError for a word that is none of `CHOICES`."""
    if kernels not in CHOICES:
        raise ValueError(f"kernels = {kernels!r} is unknown: use one of {', '.join(CHOICES)}")
    _Chosen.kernels = cast(StepKernels, kernels)


def step_kernels() -> StepKernels:
    """Return the choice."""
    return _Chosen.kernels


def resolved(impl: str) -> str:
    """Return the `impl` of an operator of ours: "torch" in place of "auto" where that is chosen."""
    return "torch" if impl == "auto" and _Chosen.kernels == "torch" else impl
