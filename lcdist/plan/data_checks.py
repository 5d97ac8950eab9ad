"""Conflicts among the settings of `[data]`, one line each."""

from collections.abc import Iterator
from pathlib import Path

from lcdist.config.schema import DataConfig
from lcdist.data.datasets.long_documents import LongDocuments


def data_errors(data: DataConfig) -> Iterator[str]:
    """Yield the conflicts within `[data]`, a line each."""
    if data.source == "synthetic":
        yield from _synthetic_errors(data)
    elif not data.path and not data.mixture:
        yield (
            "data.path is empty: name a folder made by 'lcdist tokenize', or set "
            "data.source = 'synthetic'"
        )
    if data.documents == "join":
        if data.packing != "cut":
            yield (
                "data.packing = 'best_fit' keeps documents whole, and data.documents = 'join' has "
                "no documents; set data.documents = 'pack', or data.packing = 'cut'"
            )
        if data.balance:
            yield (
                "data.balance = true: with data.documents = 'join' all samples cost the same; "
                "set data.documents = 'pack', or data.balance = false"
            )
    yield from _mixture_errors(data)
    yield from _long_errors(data)


def _synthetic_errors(data: DataConfig) -> Iterator[str]:
    if data.path:
        yield f"data.path = '{data.path}' has no meaning with data.source = 'synthetic'"
    for key in ("mixture", "long_from", "long_factor"):
        if getattr(data, key):
            yield (
                f"data.{key} has no meaning with data.source = 'synthetic'; leave it out, or read "
                "folders with data.source = 'tokens'"
            )
    if data.packing != "cut":
        yield "data.packing = 'best_fit' is for data.source = 'tokens'; use 'cut'"


def _mixture_errors(data: DataConfig) -> Iterator[str]:
    paths: dict[Path, str] = {}
    for name, source in data.mixture.items():
        if not source.path:
            yield f"data.mixture.{name}.path is empty: name a folder made by 'lcdist tokenize'"
        twin = paths.setdefault(Path(source.path), name)
        if twin != name:
            yield (
                f"data.mixture.{name}.path = '{source.path}' is also data.mixture.{twin}.path; "
                "leave one out and give the other the sum of their weights"
            )


def _long_errors(data: DataConfig) -> Iterator[str]:
    bounds, factors = list(data.long_from), list(data.long_factor)
    if len(bounds) != len(factors):
        yield (
            f"data.long_from = {bounds} and data.long_factor = {factors}: every length needs a "
            "factor"
        )
    elif bounds != sorted(set(bounds)):
        yield f"data.long_from = {bounds}: lengths must increase"
    try:
        _ = LongDocuments(data.long_from, data.long_factor).copies_by_band
    except ValueError as error:
        yield str(error)
