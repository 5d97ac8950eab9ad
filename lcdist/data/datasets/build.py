"""Build the training dataset from `[data]`, check its settings, and report what a run reads."""

from pathlib import Path

import numpy as np

from lcdist.config.schema import DataConfig
from lcdist.data.datasets.long_documents import LongDocuments
from lcdist.data.datasets.mixture import FolderDataset, Mixture, round_tokens, source_seed
from lcdist.data.datasets.packed import PackedDataset
from lcdist.data.datasets.tokens import TokenDataset
from lcdist.layout.documents import DocumentLayout


def build_dataset(
    data: DataConfig, seqlen: int, seed: int, document_layout: DocumentLayout
) -> FolderDataset | Mixture:
    """Build the dataset of the train split of the folder or mixture in `data`.

    Args:
        data: section `[data]` of the configuration, with source "tokens".
        seqlen: slots per sample.
        seed: seed of the run.
        document_layout: layout of the documents.

    Raises:
        ValueError: as the datasets; or the folders of a mixture were made with different
            tokenizers.
    """
    dataset_class = PackedDataset if data.packing == "best_fit" else TokenDataset
    shared = {
        "document_layout": document_layout,
        "long_documents": LongDocuments(data.long_from, data.long_factor),
        "answers_only": data.targets == "answers",
    }
    if not data.mixture:
        return dataset_class(data.path, "train", seqlen, seed, **shared)
    sources: dict[str, FolderDataset] = {}
    for name, source in data.mixture.items():
        dataset = dataset_class(source.path, "train", seqlen, source_seed(seed, name), **shared)
        sources[name] = dataset
        first_name, first = next(iter(sources.items()))
        if dataset.meta.fingerprint != first.meta.fingerprint:
            raise ValueError(
                f"data.mixture.{name}.path = '{source.path}' was made with another tokenizer than "
                f"that of data.mixture.{first_name}: tokenize one of them again with the other's "
                f"(--tokenizer {data.mixture[first_name].path})"
            )
    weights = {name: source.weight for name, source in data.mixture.items()}
    return Mixture(sources, weights, seed)


def token_folders(data: DataConfig) -> list[Path]:
    """Return the token folders that `data` reads, each once."""
    paths = [data.path, *(source.path for source in data.mixture.values())]
    return [Path(path) for path in dict.fromkeys(paths) if path]


def held_out_folder(data: DataConfig) -> Path:
    """Return the folder that provides the valid split and the tokenizer.

    Raises:
        ValueError: `data` does not read token folders.
    """
    if data.source != "tokens":
        raise ValueError(
            f"data.source = '{data.source}' has no valid split and no tokenizer: set data.path to "
            "a folder made by 'lcdist tokenize'"
        )
    first = next(iter(data.mixture.values()), None)
    return Path(data.path or (first.path if first else ""))


def coverage_lines(dataset: FolderDataset | Mixture, num_samples: int) -> list[str]:
    """Describe what the first `num_samples` samples read.

    Returns:
        One line for each source, and one for each of its length bands.
    """
    if not isinstance(dataset, Mixture):
        return _source_lines("data", dataset, num_samples, 1.0)
    samples = dataset.samples_by_source(num_samples)
    tokens = {
        name: float(samples[name] / source.samples_per_round) * round_tokens(source)
        for name, source in dataset.sources.items()
    }
    total = sum(tokens.values()) or 1.0
    return [
        line
        for name, source in dataset.sources.items()
        for line in _source_lines(name, source, samples[name], tokens[name] / total)
    ]


def _source_lines(
    name: str, dataset: FolderDataset, num_samples: int, token_share: float
) -> list[str]:
    rounds = float(num_samples / dataset.samples_per_round)
    lengths = dataset.document_lengths
    copies = np.asarray(dataset.long_documents.copies_by_band)
    bands = dataset.long_documents.bands(lengths)
    stored_tokens = np.bincount(bands, lengths, minlength=len(copies))
    round_band_tokens = stored_tokens * copies
    lines = [
        f"{name}: {token_share:.2%} of the tokens; {rounds * round_band_tokens.sum():,.0f} tokens "
        f"read of {dataset.num_tokens:,}, each {_times(rounds * copies[0])}"
    ]
    if isinstance(dataset, PackedDataset):
        padding = 1 - dataset.round_slots / (dataset.num_rows * dataset.seqlen)
        lines.append(
            f"{name}: {dataset.num_rows:,} rows, {padding:.2%} padding; "
            f"{dataset.num_cut_documents:,} documents are longer than a row and cut"
        )
    for band, bound in enumerate(dataset.long_documents.bounds, 1):
        lines.append(
            f"{name}: documents from {bound:,} tokens: "
            f"{stored_tokens[band] / stored_tokens.sum():.2%} of the tokens stored, "
            f"{round_band_tokens[band] / round_band_tokens.sum():.2%} of those drawn, each "
            f"{_times(rounds * copies[band])}"
        )
    return lines


def _times(times: float) -> str:
    return f"{times:.2f} times" if times >= 0.01 else f"{times:.1e} times"
