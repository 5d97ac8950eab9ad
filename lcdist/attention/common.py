"""Deprecated import path: use `lcdist.attention.shared.checks`."""

import warnings
from typing import Any

from lcdist.attention.shared import checks


def __getattr__(name: str) -> Any:
    value = getattr(checks, name)
    warnings.warn(
        f"lcdist.attention.common.{name}: import it from lcdist.attention.shared.checks",
        DeprecationWarning,
        stacklevel=2,
    )
    return value
