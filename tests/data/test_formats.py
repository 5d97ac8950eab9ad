"""Compressed JSONL and parquet: every record once; errors name the file and the line or row."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lcdist.data.prepare import readers
from lcdist.data.prepare.corpus import Source, scan_source
from lcdist.data.prepare.prepare import prepare
from tests.data.test_corpus import read
from tests.data.test_prepare import SETTINGS, change, contents

LINES = [json.dumps({"text": f"line {i} é\n", "body": f"other {i}"}) for i in range(50)]


def compress(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        codec = pyarrow.Codec("zstd")
        half = len(content) // 2
        # Two frames, as parallel compressors write them.
        frames = [codec.compress(part, asbytes=True) for part in (content[:half], content[half:])]
        path.write_bytes(b"".join(frames))
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_compressed_lines_equal_plain_lines(ending: str, tmp_path: Path) -> None:
    path = compress(tmp_path / f"a.jsonl{ending}", "\n".join(LINES).encode())
    found, skipped = read(path)
    assert [text for _, text in found] == [json.loads(line)["text"] for line in LINES]
    starts = [sum(len(line) + 1 for line in LINES[:i]) for i in range(len(LINES))]
    assert [name for name, _ in found] == [f"a.jsonl{ending}@{start}" for start in starts]
    assert not skipped
    assert [text for _, text in read(path, field="body")[0]] == [f"other {i}" for i in range(50)]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_unreadable_lines_of_compressed_files_are_named(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcdist.data.prepare.chunks.CHUNK_BYTES", 200)
    lines = [line.encode() for line in LINES]
    lines[7], lines[30], lines[31] = b"{", b'{"text": 3, "id": 4}', b'{"text": "\xff"}'
    path = compress(tmp_path / f"a.jsonl{ending}", b"\n".join(lines))
    with pytest.raises(ValueError, match=rf"a\.jsonl{ending}, line 8, byte \d+: not JSON"):
        read(path)
    found, skipped = read(path, "skip")
    assert len(found) == 47 and [entry["line"] for entry in skipped] == [8, 31, 32]
    offset = sum(len(line) + 1 for line in lines[:31]) + lines[31].index(b"\xff")
    assert skipped[2]["offset"] == offset and "not UTF-8" in skipped[2]["reason"]
    assert "no" in skipped[1]["reason"] and "it has text, id" in skipped[1]["reason"]
    with pytest.raises(ValueError, match='line 1, .* under "nothing"; it has text, body'):
        read(path, field="nothing")


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "not compressed"])
def test_a_damaged_compressed_file_raises(ending: str, damage: str, tmp_path: Path) -> None:
    content = "\n".join(f'{{"text": "{i} {i * 7919 % 1000003}"}}' for i in range(40000))
    path = compress(tmp_path / f"a.jsonl{ending}", content.encode())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2 + 7] if damage == "cut" else content.encode())
    with pytest.raises(ValueError, match=r"a\.jsonl.*damaged or truncated"):
        read(path)
    found, skipped = read(path, "skip")
    assert len(found) < 40000 and len(skipped) == 1
    if damage == "cut":
        assert found and skipped[0]["line"] >= len(found)


def test_unsupported_compression_raises_and_other_files_are_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.png", "c.png", "d.tar.gz"):
        (tmp_path / name).write_text("text")
    assert scan_source(Source(tmp_path)).left_out == {"suffix .gz": 1, "suffix .png": 2}
    made = prepare(Source(tmp_path), tmp_path / "out", change(vocab_size=None), "bytes")
    assert made.meta.source["left_out"] == {"suffix .gz": 1, "suffix .png": 2}
    with pytest.raises(
        ValueError, match=r"d\.tar\.gz: this kind of compressed file is not supported"
    ):
        scan_source(Source(tmp_path / "d.tar.gz"))


def write_parquet(path: Path, texts: list, rows: int, kind=None) -> Path:
    column = pyarrow.array(texts, kind)
    table = pyarrow.table({"id": list(range(len(texts))), "text": column})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)
    return path


@pytest.mark.parametrize(
    "kind",
    [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.utf8())],
)
def test_parquet_is_read_in_row_groups(
    kind: pyarrow.DataType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"row {i % 40} é" for i in range(100)]
    path = write_parquet(tmp_path / "a.parquet", texts, 33, kind)
    requests: list[tuple] = []
    batches = pyarrow.parquet.ParquetFile.iter_batches

    def counted(self, size, **words):
        requests.append((size, *words["row_groups"]))
        return batches(self, size, **words)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counted)
    monkeypatch.setattr(readers, "_BATCH_ROWS", 7)
    found, skipped = read(path)
    assert [text for _, text in found] == texts and not skipped
    assert [name for name, _ in found] == [f"a.parquet@{row}" for row in range(1, 101)]
    assert requests == [(7, group) for group in range(4)]
    groups = readers.parquet_row_groups(scan_source(Source(path)).files[0])
    assert [group[:2] for group in groups] == [(0, 33), (33, 66), (66, 99), (99, 100)]
    assert sum(group[2] for group in groups) == path.stat().st_size


def test_unreadable_rows_and_columns_of_parquet_are_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a", None, "c", "d", None], 2)
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: no text \(null\)"):
        read(path)
    found, skipped = read(path, "skip")
    assert [text for _, text in found] == ["a", "c", "d"]
    assert [entry["row"] for entry in skipped] == [2, 5]
    with pytest.raises(ValueError, match=r'a\.parquet: no column "body"; it has id, text'):
        read(path, field="body")
    with pytest.raises(ValueError, match='column "id" holds int64, not text'):
        read(path, field="id")
    assert len(read(path, "skip", field="body")[1]) == 1
    bad = pyarrow.Array.from_buffers(
        pyarrow.utf8(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"),
                            pyarrow.py_buffer(b"a\xff")]
    )  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet, row 2: not UTF-8"):
        read(tmp_path / "b.parquet")


@pytest.mark.parametrize("damage", ["cut", "junk", "middle"])
def test_damaged_parquet_raises(damage: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [f"row {i}" * 9 for i in range(100)], 50)
    whole = path.read_bytes()
    broken = {
        "cut": whole[: len(whole) // 2],
        "junk": b"junk",
        "middle": whole[:40] + bytes(500) + whole[540:],
    }
    path.write_bytes(broken[damage])
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: not parquet, or damaged"):
        read(path)
    found, skipped = read(path, "skip")
    assert skipped and len(found) in (0, 50)
    if damage == "middle":
        assert "rows 1 to 50 are lost" in skipped[0]["reason"]


def test_without_pyarrow_the_error_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a"], 1)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a\.parquet: .*pip install 'lcdist\[parquet\]'"):
        prepare(Source(path), tmp_path / "out", SETTINGS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.parquet"]


def test_every_format_gives_the_same_tokens(tmp_path: Path) -> None:
    texts = [f"document {i} of {i * i} " * (i % 5) for i in range(60)]
    lines = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    sources = [compress(tmp_path / f"a.jsonl{ending}", lines) for ending in ("", ".gz", ".zst")]
    sources.append(write_parquet(tmp_path / "a.parquet", texts, 16))
    settings = change(vocab_size=None, valid_fraction=0.0)
    made = [
        prepare(Source(path), tmp_path / f"out{path.suffix}", settings, "bytes") for path in sources
    ]
    first = contents(made[0].folder)
    for other in made[1:]:
        assert other.meta.empty == 12 and contents(other.folder)["train.bin"] == first["train.bin"]
        assert contents(other.folder)["train.idx"] == first["train.idx"]


def test_document_bytes_keeps_a_long_text_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 500_000)
    settings = change(vocab_size=None, valid_fraction=0.0)
    made = prepare(Source(tmp_path / "a.txt"), tmp_path / "mebibytes", settings, "bytes")
    assert made.meta.documents == {"train": 3}
    longer = change(vocab_size=None, valid_fraction=0.0, document_bytes=10**7)
    made = prepare(Source(tmp_path / "a.txt"), tmp_path / "whole", longer, "bytes")
    assert made.meta.documents == {"train": 1} and made.meta.tokens == {"train": 2_500_001}
