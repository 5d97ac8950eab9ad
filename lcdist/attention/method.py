"""Deprecated import path: use `lcdist.attention.interface`."""

import warnings
from typing import Any

from lcdist.attention import interface


def __getattr__(name: str) -> Any:
    value = getattr(interface, name)
    warnings.warn(
        f"lcdist.attention.method.{name}: import it from lcdist.attention.interface",
        DeprecationWarning,
        stacklevel=2,
    )
    return value
