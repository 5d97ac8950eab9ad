"""Token folders with given documents, made without a corpus."""

from collections.abc import Sequence
from pathlib import Path

from lcdist.data.meta import Meta, write_meta
from lcdist.data.prepare.indexed import IndexedWriter

VOCAB = 60000


def token_folder(folder: Path, lengths: Sequence[int], first: int = 0, mark: str = "") -> Path:
    """Documents of `lengths` tokens, which are numbered on from `first`; valid has the first one.

    mark: the tokenizer's fingerprint.
    """
    folder.mkdir(parents=True)
    for split, held in (("train", lengths), ("valid", lengths[:1])):
        start = first
        with IndexedWriter(folder / split, VOCAB) as writer:
            for length in held:
                writer.add(range(start, start + length))
                start += length
    tokens = {"train": sum(lengths), "valid": lengths[0]}
    documents = {"train": len(lengths), "valid": 1}
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    write_meta(folder, Meta(1, "", VOCAB, 0, mark, documents, tokens, {}, {}, 0, [], files))
    return folder
