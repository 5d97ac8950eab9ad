"""Every byte of a source becomes part of a document, or an error names its location."""

import json
from pathlib import Path

import pytest

from lcdist.data.prepare import chunks as chunks_module
from lcdist.data.prepare.chunks import (
    OnError,
    ReadOptions,
    SkipCounts,
    read_documents,
    shift_lines,
    split_file,
)
from lcdist.data.prepare.corpus import Source, SourceFile, scan_source, standard_library


def read(
    folder: Path, on_error: OnError = "refuse", field: str = "text", **options
) -> tuple[list, list]:
    """Return (name, text) of all documents, and the skipped entries."""
    read_options, found, skipped = ReadOptions(on_error, field), [], []
    for file in scan_source(Source(folder, **options)).files:
        lines = 0
        for chunk in split_file(file):
            skip_counts = SkipCounts()
            found += [
                (document.name, document.text)
                for document in read_documents(chunk, read_options, skip_counts)
            ]
            skipped += shift_lines(skip_counts.skipped, lines)
            lines += skip_counts.lines
    return found, skipped


def test_a_folder_is_read_completely_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/y.py", "a/skip/x.txt", ".git/w.txt", "picture.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() + b"\r\n\tend")
    names = [name for name, _ in read(tmp_path, exclude=("skip",))[0]]
    assert names == ["a/y.py", "a/z.md", "b.txt"]
    assert read(tmp_path, suffixes=(".md",))[0] == [("a/z.md", "a/z.md\r\n\tend")]
    assert read(tmp_path / "picture.png")[0] == [("picture.png", "picture.png\r\n\tend")]


def test_max_bytes_limits_the_files(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text("x" * 100)
    names = [file.name for file in scan_source(Source(tmp_path, max_bytes=450)).files]
    assert len(names) == 4 and names == sorted(names) and names != ["0.txt", "1.txt", "2.txt"]
    with pytest.raises(ValueError, match="max_bytes = 10: .*smallest has 100 bytes"):
        scan_source(Source(tmp_path, max_bytes=10))


def test_missing_and_unsuitable_folders_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        scan_source(Source(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="has no file"):
        scan_source(Source(tmp_path))
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=r"ends in \.txt.*it has suffix \.png \(1\)"):
        scan_source(Source(tmp_path))


@pytest.mark.parametrize("text", ["line é\n" * 999, "é" * 4001, "x" * 99 + "\n" + "€" * 3000, ""])
def test_chunks_tile_a_file_without_breaking_a_character(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks_module, "CHUNK_BYTES", 500)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    found = split_file(SourceFile(path, "a.txt", path.stat().st_size), [77, 1300])
    documents = [
        d for chunk in found for d in read_documents(chunk, ReadOptions("refuse"), SkipCounts())
    ]
    assert "".join(document.text for document in documents) == text
    assert len(found) == 1 or max(chunk.stop - chunk.start for chunk in found) < 600
    names = [document.name for document in documents]
    assert names[0] == "a.txt" and len(set(names)) == len(names)


def test_undecodable_bytes_raise_or_are_listed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine")
    (tmp_path / "b.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(ValueError, match=r"b\.txt, byte 3: not UTF-8.*on_error"):
        read(tmp_path)
    found, skipped = read(tmp_path, "skip")
    assert found == [("a.txt", "fine")]
    assert skipped == [{"file": "b.txt", "offset": 3, "reason": "not UTF-8 (invalid start byte)"}]
    with pytest.raises(ValueError, match="on_error = 'ignore': must be"):
        read(tmp_path, "ignore")  # type: ignore[arg-type]


GOOD = [json.dumps({"text": f"a\u2028b\r\n{i}", "id": i}, ensure_ascii=False) for i in range(3)]
# In JSON a bare carriage return is a space, not the end of a line.
GOOD[1] = '{"text":\r"b"}'
BAD = {
    b'{"text": "a"': "line 3, byte {0}: not JSON",
    b'{"txt": "a"}': 'line 3, byte {0}: not an object with a string under "text"',
    b'["text"]': "not an object",
    b'{"text": 3}': "not an object",
    b'{"text": "\\ud800"}': "lone surrogate",
    b'{"text": "\xff"}': "line 3, byte {1}: not UTF-8",
}


@pytest.mark.parametrize("line", list(BAD))
@pytest.mark.parametrize("chunk_bytes", [2**20, 16])
def test_an_unreadable_line_of_jsonl_is_named(
    line: bytes, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks_module, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "a.jsonl"
    head = f"{GOOD[0]}\n\n".encode()
    path.write_bytes(head + line + f"\n{GOOD[1]}\n{GOOD[2]}".encode())
    places = (len(head) + (12 if b"{" in line and b': "a"' in line and b"}" not in line else 0),)
    expected = BAD[line].format(*places, len(head) + 10)
    with pytest.raises(ValueError) as caught:
        read(path)
    assert expected in str(caught.value)
    found, skipped = read(path, "skip")
    assert [text for _, text in found] == [json.loads(good)["text"] for good in GOOD]
    assert len({name for name, _ in found}) == 3
    assert len(skipped) == 1 and skipped[0]["line"] == 3


def test_the_standard_library_is_read_without_tests() -> None:
    source = standard_library()
    names = {file.name for file in scan_source(source).files}
    assert {"ast.py", "json/decoder.py"} <= names
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")[:-1]) for name in names)
    found, _ = read(Path(source.path), suffixes=(".py",), exclude=source.exclude)
    assert len(found) == len(names)
    assert sum(f.size for f in scan_source(standard_library(max_bytes=100_000)).files) <= 100_000
