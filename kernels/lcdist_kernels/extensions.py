"""Compiled extensions of other packages, by what of them can be called and passes a self-test.

Nothing is said by a package's name or version: a part is found by its functions, and used once its
results on small tensors are those of torch. `apex.py` and `transformer_engine.py` hold the parts.
"""

from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcdist_kernels.common import log_choice

_USED: list[str] = []


class Part(NamedTuple):
    """A part of a package.

    Attributes:
        name: what it does: "weights", "norm" or "adamw".
        package: whose it is, in messages.
        module: the extension.
        functions: what it must offer.
        test: (module, device) -> whether results on small tensors are right.
        loader: module whose import loads the extension; "": it is imported itself.
    """

    name: str
    package: str
    module: str
    functions: tuple[str, ...]
    test: Callable[[Any, torch.device], bool]
    loader: str = ""


def find(part: Part, device: torch.device) -> Any:
    """Return a part's extension, or None where it is missing or its results are wrong.

    Says once in the log which extension is used.
    """
    found = _found(part, device)
    return None if isinstance(found, str) else found


def missing(parts: Iterable[Part], device: torch.device) -> list[str]:
    """Return a few words on every part that cannot be used on a device."""
    found = [(part.name, _found(part, device)) for part in parts]
    return [f"{name} ({reason})" for name, reason in found if isinstance(reason, str)]


def used() -> list[str]:
    """Return a few words on every part that has been found so far."""
    return list(_USED)


@cache
def _found(part: Part, device: torch.device) -> Any:
    """Return a part's extension, or why there is none."""
    try:
        if part.loader:
            import_module(part.loader)
        module = import_module(part.module)
    except ImportError as error:
        return f"{part.module}: {_first_line(error)}"
    except Exception as error:
        # A package that does not fit its own libraries ends with whatever its loader raises.
        return f"{part.module} raised {type(error).__name__}: {_first_line(error)}"
    absent = [function for function in part.functions if not hasattr(module, function)]
    if absent:
        return f"{part.module} has no {', '.join(absent)}"
    try:
        is_right = part.test(module, device)
    except Exception as error:
        # Extensions raise whatever their build raises.
        return f"{part.module} raised {type(error).__name__}: {_first_line(error)}"
    if not is_right:
        return f"{part.module} gives other results than torch"
    said = f"{part.package}'s {part.module} for {part.name}"
    log_choice(said)
    _USED.append(said)
    return module


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def norm_is_right(fwd: Callable[..., Any], bwd: Callable[..., Any], device: torch.device) -> bool:
    """Return whether an RMSNorm and its gradients are those of torch on a small tensor.

    Args:
        fwd: (x, weight, eps) -> norm and 1 / rms.
        bwd: (gradient of the norm, x, 1 / rms, weight, eps) -> gradients of x and weight.
        device: where to try.
    """
    made = torch.Generator().manual_seed(0)
    x, dnormed = (torch.randn(5, 64, generator=made).to(device) for _ in range(2))
    weight = torch.rand(64, generator=made).to(device)
    # The first norm may be an evaluation's.
    with torch.enable_grad():
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        truth = torch.nn.functional.rms_norm(leaves[0], (64,), leaves[1], 1e-5)
        grads = torch.autograd.grad(truth, leaves, dnormed)
    expected: list[Tensor] = [truth.detach(), *grads]
    normed, rstd = fwd(x, weight, 1e-5)
    got = [normed, *bwd(dnormed, x, rstd, weight, 1e-5)]
    return all(torch.allclose(a, b, 1e-4, 1e-5) for a, b in zip(got, expected, strict=True))
