"""Declare fields of the configuration's dataclasses, with the bounds that the loader checks."""

from dataclasses import field
from typing import Any


def at_least(low: float, default: Any) -> Any:
    """Declare a field with a default that must be at least `low`."""
    return field(default=default, metadata={"min": low})


def above(low: float, default: Any) -> Any:
    """Declare a field with a default that must be greater than `low`."""
    return field(default=default, metadata={"above": low})


def required(low: float | None = None) -> Any:
    """Declare a field without a default, with an optional lower bound."""
    return field(metadata={} if low is None else {"min": low})
