"""Nothing is lost in silence: the account of a source adds up, and damage is found at the door."""

import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lcdist.commands.main import main
from lcdist.data.datasets.packed import PackedDataset
from lcdist.data.datasets.split import TokenSplit
from lcdist.data.datasets.tokens import TokenDataset
from lcdist.data.meta import read_meta
from lcdist.data.prepare import indexed
from lcdist.data.prepare.chunks import ReadOptions, SkipCounts, read_documents, split_file
from lcdist.data.prepare.corpus import Source, digest_files, scan_source
from lcdist.data.prepare.indexed import check_index
from lcdist.utils.errors import RankError
from tests.data.folders import token_folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a folder with everything that may be left out."""
    root, elsewhere = tmp_path / "text", tmp_path / "elsewhere"
    for path in ("a.txt", "in/b.txt", "in/LICENSE", "c.png", ".git/d.txt", ".git/in/e.txt"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)
    for path in ("out/f.txt", "g.txt", "h.txt"):
        (elsewhere / path).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / path).write_text(path)
    (root / "skip").mkdir()
    (root / "skip" / "i.txt").write_text("i")
    (root / "linked.txt").symlink_to(elsewhere / "g.txt")
    (root / "gone.txt").symlink_to(elsewhere / "nowhere")
    (root / "itself.txt").symlink_to(root / "itself.txt")
    (root / "linked").symlink_to(elsewhere / "out")
    (root / "in" / "round").symlink_to(root)
    os.mkfifo(root / "pipe.txt")
    return root


def test_files_seen_are_those_read_and_those_left_out(tree: Path) -> None:
    listing = scan_source(Source(tree, exclude=("skip",)))
    assert [file.name for file in listing.files] == ["a.txt", "in/b.txt", "linked.txt"]
    assert listing.left_out == {
        "dangling link": 2,
        "excluded folder": 1,
        "hidden folder": 1,
        "linked folder": 1,
        "loop of links": 1,
        "neither file nor folder": 1,
        "no suffix": 1,
        "suffix .png": 1,
    }
    assert listing.seen == len(listing.files) + sum(listing.left_out.values()) == 12


def test_links_and_hidden_folders_are_read_when_asked_for(tree: Path) -> None:
    listing = scan_source(Source(tree, follow_links=True, hidden=True, max_bytes=11))
    names = [file.name for file in listing.files]
    assert listing.left_out["loop of links"] == 1 and listing.left_out["beyond max_bytes"] >= 1
    assert listing.seen == len(names) + sum(listing.left_out.values())
    whole = [file.name for file in scan_source(Source(tree, follow_links=True, hidden=True)).files]
    assert set(whole) == {
        *(".git/d.txt", ".git/in/e.txt", "a.txt", "in/b.txt", "linked.txt", "linked/f.txt"),
        "skip/i.txt",
    }
    assert set(names) < set(whole)


def test_the_command_prints_the_account_and_its_options(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tokenize(out: str, *options: str) -> str:
        words = ["tokenize", str(tree), str(tmp_path / out), "--tokenizer", "bytes"]
        assert main([*words, "--valid-fraction", "0", "--workers", "1", *options]) == 0
        return capsys.readouterr().out

    output = tokenize("few")
    assert "files: 12 seen, 4 read, 8 left out: 2 x dangling link" in output
    assert "to read those folders too, give --hidden and --follow-links" in output
    meta = read_meta(tmp_path / "few")
    assert meta.documents == {"train": 4} and sum(meta.source["left_out"].values()) == 8
    (tree / "new.gif").touch()
    assert "13 seen, 4 read, 9 left out" in tokenize("few"), "the account is of today's source"
    assert "--hidden" not in tokenize("all", "--hidden", "--follow-links")
    assert read_meta(tmp_path / "all").documents == {"train": 7}


def test_a_folder_that_cannot_be_listed_is_an_error(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: Callable = os.scandir

    def scandir(path):
        if Path(path).name == "in":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"text/in: the folder cannot be listed \(Permission den"):
        scan_source(Source(tree))


def write_source(path: Path, texts: list[str]) -> None:
    lines = "".join(f'{{"text": "{text}"}}\n' for text in texts).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        path.write_bytes(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)


CHANGES = {
    "grown": lambda path: write_source(path, ["one", "two", "three"]),
    "shrunk": lambda path: os.truncate(path, path.stat().st_size - 5),
    "rewritten": lambda path: path.write_bytes(path.read_bytes()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_file_that_changes_while_it_is_read_is_named(
    name: str, change: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    write_source(path, ["one", "two"])
    os.utime(path, ns=(0, 0))
    [file] = scan_source(Source(path)).files
    chunks = split_file(file)
    digest_files([file])
    CHANGES[change](path)
    message = rf"{name}: (changed|was written to) while it was read.*run the command again"
    with pytest.raises(ValueError, match=message):
        digest_files([file])
    for on_error in ("refuse", "skip"):
        with pytest.raises(ValueError, match=message):
            for chunk in chunks:
                list(read_documents(chunk, ReadOptions(on_error), SkipCounts()))


# Change of an index of documents of 3, 4, 5, 6 and 7 tokens, and what the message says. A header
# has 34 bytes: 9 of magic, version, code of the type, number of sequences, number of documents.
DAMAGE = {
    "cut": (lambda raw: raw[:20], "has 20 bytes, fewer than the 34"),
    "zeros": (lambda raw: bytes(len(raw)), "does not begin as an index of version 1"),
    "version": (lambda raw: raw[:9] + bytes([2]) + raw[10:], "does not begin as an index"),
    "type": (lambda raw: raw[:17] + b"\x09" + raw[18:], "of an unknown type .9."),
    "count": (lambda raw: raw[:18] + struct.pack("<Q", 2**60) + raw[26:], "lists 1152921504606846"),
    "tail": (lambda raw: raw[:-1], "lists 5 documents in 141 bytes, which take 142"),
    "empty": (lambda raw: raw[:50] + struct.pack("<i", 0) + raw[54:], "document 4 has 0 tokens"),
    "negative": (lambda raw: raw[:46] + struct.pack("<i", -6) + raw[50:], "document 3 has -6 tok"),
    "lengths": (
        lambda raw: raw[:34] + raw[38:42] + raw[34:38] + raw[42:],
        "document 1 begins at byte 6, and those before it end at byte 8",
    ),
    "pointer": (
        lambda raw: raw[:86] + struct.pack("<q", 10**15) + raw[94:],
        "document 4 begins at byte 1000000000000000, and those before it end at byte 36",
    ),
    "sequences": (lambda raw: raw[:-16] + bytes(16), "document 4 begins with sequence 0, and each"),
}


@pytest.mark.parametrize("block", [2, 2**20])
@pytest.mark.parametrize("damage", DAMAGE)
def test_an_index_is_checked_when_it_is_opened(
    damage: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "_CHECKED_DOCUMENTS", block)
    folder = token_folder(tmp_path / "data", [3, 4, 5, 6, 7])
    check_index(folder / "train")
    path = folder / "train.idx"
    change, message = DAMAGE[damage]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"train\.idx: .*{message}.*; remove the folder and make"):
        check_index(folder / "train")
    if path.stat().st_size == 142:
        with pytest.raises(ValueError, match=rf"train\.idx: .*{message}"):
            TokenSplit(folder, "train")


@pytest.mark.parametrize(("vocab", "kind", "token"), [(60000, "<H", 65000), (70000, "<i", -1)])
def test_tokens_that_no_vocabulary_has_are_refused_with_their_document(
    vocab: int, kind: str, token: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.data.folders.VOCAB", vocab)
    folder, width = token_folder(tmp_path / "data", [10, 20, 30]), struct.calcsize(kind)
    for dataset in (TokenDataset, PackedDataset):
        reads = dataset(folder, "train", 8, 0)
        assert all(0 <= int(reads.sample(i).tokens.max()) < vocab for i in range(8))
    path = folder / "train.bin"
    raw = bytearray(path.read_bytes())
    raw[17 * width : 18 * width] = struct.pack(kind, token)
    path.write_bytes(raw)
    message = rf"data/train\.bin: token 7 of document 1 is {token}, and the vocabulary has 0 to"
    for dataset in (TokenDataset, PackedDataset):
        reads = dataset(folder, "train", 8, 0)
        with pytest.raises(RankError, match=message):
            for i in range(9):
                reads.sample(i)
    split = TokenSplit(folder, "train")
    assert np.array_equal(split.document(0), np.arange(10))
    with pytest.raises(RankError, match=message):
        split.window(0, 60)
