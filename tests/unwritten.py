"""Fill the results of `torch.empty` and similar functions with NaN: unwritten elements show.

The idea is flash-linear-attention's. Integer tensors stay as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

MAKERS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
)


def _with_nan(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(make)
    def filled(*args: Any, **kwargs: Any) -> Tensor:
        x = make(*args, **kwargs)
        if (x.is_floating_point() or x.is_complex()) and not x.is_meta:
            with torch.no_grad():
                x.fill_(float("nan"))
        return x

    return filled


def fill_empty_with_nan() -> None:
    """Patch torch for the rest of the process; for worker processes."""
    for owner, name in MAKERS:
        setattr(owner, name, _with_nan(getattr(owner, name)))


@contextmanager
def nan_in_empty() -> Iterator[None]:
    """Patch torch inside the block."""
    before = [(owner, name, getattr(owner, name)) for owner, name in MAKERS]
    fill_empty_with_nan()
    try:
        yield
    finally:
        for owner, name, make in before:
            setattr(owner, name, make)
