"""`[data]` to samples: which folders are read and how, what contradicts what, and the accounts."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lcdist.config.schema import DataConfig
from lcdist.data.datasets.long_documents import LongDocuments
from lcdist.data.datasets.mixture import Folder, Mixture, round_tokens, source_seed
from lcdist.data.datasets.packed import PackedDataset
from lcdist.data.datasets.tokens import TokenDataset
from lcdist.layout.documents import DocumentLayout


def data_errors(data: DataConfig) -> Iterator[str]:
    """What in `[data]` does not go together, a line each."""
    if data.source == "synthetic":
        yield from _made_up_errors(data)
    elif not data.path and not data.mixture:
        yield (
            "data.path is empty: name a folder made by 'lcdist tokenize', or set "
            "data.source = 'synthetic'"
        )
    if data.documents == "join":
        if data.packing != "cut":
            yield (
                "data.packing = 'best_fit' keeps documents whole, and data.documents = 'join' does "
                "not know them; set data.documents = 'pack', or data.packing = 'cut'"
            )
        if data.balance:
            yield (
                "data.balance = true: with data.documents = 'join' all samples are the same work; "
                "set data.documents = 'pack', or data.balance = false"
            )
    yield from _mixture_errors(data)
    yield from _long_errors(data)


def _made_up_errors(data: DataConfig) -> Iterator[str]:
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
                f"data.mixture.{name}.path = '{source.path}' is that of data.mixture.{twin} too; "
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
        yield f"data.long_from = {bounds}: lengths must ascend"
    try:
        _ = LongDocuments(data.long_from, data.long_factor).copies_by_band
    except ValueError as error:
        yield str(error)


def build_dataset(
    data: DataConfig, seqlen: int, seed: int, slots: DocumentLayout
) -> Folder | Mixture:
    """The train split of the folder or mixture in `data`, as samples of `seqlen` slots.

    slots: how documents are laid out. Raises ValueError as the data sets do, and where the folders
    of a mixture were made with different tokenizers.
    """
    kind = PackedDataset if data.packing == "best_fit" else TokenDataset
    long = LongDocuments(data.long_from, data.long_factor)
    if not data.mixture:
        return kind(data.path, "train", seqlen, seed, slots, long)
    sources: dict[str, Folder] = {}
    for name, source in data.mixture.items():
        one = kind(source.path, "train", seqlen, source_seed(seed, name), slots, long)
        sources[name] = one
        first_name, first = next(iter(sources.items()))
        if one.meta.fingerprint != first.meta.fingerprint:
            raise ValueError(
                f"data.mixture.{name}.path = '{source.path}' was made with another tokenizer than "
                f"that of data.mixture.{first_name}: tokenize one of them again with the other's "
                f"(--tokenizer {data.mixture[first_name].path})"
            )
    weights = {name: source.weight for name, source in data.mixture.items()}
    return Mixture(sources, weights, seed)


def held_out_folder(data: DataConfig) -> Path:
    """The folder whose valid split is evaluated on, and whose tokenizer is used.

    Raises ValueError where `data` has none.
    """
    if data.source != "tokens":
        raise ValueError(
            f"data.source = '{data.source}' has no valid split and no tokenizer: set data.path to "
            "a folder made by 'lcdist tokenize'"
        )
    first = next(iter(data.mixture.values()), None)
    return Path(data.path or (first.path if first else ""))


def coverage_lines(dataset: Folder | Mixture, samples: int) -> list[str]:
    """What the first `samples` samples read, a line for every source and every band of lengths."""
    if not isinstance(dataset, Mixture):
        return _lines("data", dataset, samples, 1.0)
    drawn = dataset.drawn(samples)
    tokens = {
        name: float(drawn[name] / one.round_rows) * round_tokens(one)
        for name, one in dataset.sources.items()
    }
    total = sum(tokens.values()) or 1.0
    return [
        line
        for name, one in dataset.sources.items()
        for line in _lines(name, one, drawn[name], tokens[name] / total)
    ]


def _lines(name: str, folder: Folder, samples: int, share: float) -> list[str]:
    rounds = float(samples / folder.round_rows)
    lengths, copies = folder.document_lengths, np.asarray(folder.long.copies_by_band)
    bands = folder.long.bands(lengths)
    stored = np.bincount(bands, lengths, minlength=len(copies))
    drawn = stored * copies
    lines = [
        f"{name}: {share:.2%} of the tokens; {rounds * drawn.sum():,.0f} tokens read of "
        f"{folder.tokens:,}, each {_times(rounds * copies[0])}"
    ]
    if isinstance(folder, PackedDataset):
        padding = 1 - folder.length / (folder.rows * folder.seqlen)
        lines.append(
            f"{name}: {folder.rows:,} rows, {padding:.2%} padding; {folder.documents_cut:,} "
            "documents are longer than a row and cut"
        )
    for band, bound in enumerate(folder.long.bounds, 1):
        lines.append(
            f"{name}: documents from {bound:,} tokens: {stored[band] / stored.sum():.2%} of the "
            f"tokens stored, {drawn[band] / drawn.sum():.2%} of those drawn, each "
            f"{_times(rounds * copies[band])}"
        )
    return lines


def _times(times: float) -> str:
    return f"{times:.2f} times" if times >= 0.01 else f"{times:.1e} times"
