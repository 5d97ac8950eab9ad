"""Format numbers, byte counts, durations and nested tables for the report."""

import math
from collections.abc import Mapping
from typing import Any


def number(value: float | None) -> str:
    """Return a number with three significant digits; a dash for None and non-finite numbers."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) < 100:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.2e}"


def finite(value: float | None) -> float | None:
    """Return a number, or None if it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def amount(value: float) -> str:
    """Return a count with a decimal prefix: 4.19 M, 812 k."""
    for size, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}"


def size(value: float) -> str:
    """Return bytes with a binary prefix: 1.5 GiB, 12 KiB."""
    for unit, prefix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{value / unit:.1f} {prefix}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Return seconds as text: 42 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return (name, value) rows of nested tables, names joined by dots and values as text."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            rows.append((name, ", ".join(_value_text(entry) for entry in value) or "none"))
        else:
            rows.append((name, _value_text(value)))
    return rows


def _value_text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


def percent(fraction: float) -> str:
    """Return a fraction as percentage; a dash for a non-finite number."""
    return f"{100 * fraction:.1f}%" if math.isfinite(fraction) else "–"
