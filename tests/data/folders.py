"""Make token folders with given documents, without a corpus."""

from collections.abc import Sequence
from pathlib import Path

from lcdist.data.meta import Meta, write_meta
from lcdist.data.prepare.indexed import IndexedWriter

VOCAB = 60000


def token_folder(
    folder: Path, lengths: Sequence[int], first: int = 0, fingerprint: str = ""
) -> Path:
    """Write documents of `lengths` tokens, numbered consecutively from `first`.

    The valid split has a copy of the first document. `fingerprint` is that of the tokenizer.
    """
    folder.mkdir(parents=True)
    for split, split_lengths in (("train", lengths), ("valid", lengths[:1])):
        start = first
        with IndexedWriter(folder / split, VOCAB) as writer:
            for length in split_lengths:
                writer.add(range(start, start + length))
                start += length
    tokens = {"train": sum(lengths), "valid": lengths[0]}
    documents = {"train": len(lengths), "valid": 1}
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    write_meta(folder, Meta(1, "", VOCAB, 0, fingerprint, documents, tokens, {}, {}, 0, [], files))
    return folder
