"""SHA-256 of files: of what is being written, and of files at rest."""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

# The digests of a folder, in the format of `sha256sum -c`.
SUMS = "SHA256SUMS"
# Smaller pieces are hashed by the thread that writes them.
_BESIDE = 2**16
# Threads that hash files at rest: more would only compete for the disk.
_THREADS = 8


class HashingWriter(io.RawIOBase):
    """A binary stream that writes to another and hashes the same bytes in a second thread.

    Both release the interpreter lock, so a piece takes as long as the slower of the two. Closing
    it leaves the other stream open.
    """

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream, self._sha256 = stream, hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        """Write and hash `data`, which the caller may overwrite afterwards."""
        if len(data) < _BESIDE:
            self._sha256.update(data)
            return self._stream.write(data)
        hashed = self._thread.submit(self._sha256.update, data)
        try:
            return self._stream.write(data)
        finally:
            hashed.result()

    def flush(self) -> None:
        """Flush the other stream."""
        self._stream.flush()

    def digest(self) -> str:
        """Return the SHA-256 of everything written, in hexadecimal, and end the thread."""
        self._thread.shutdown()
        return self._sha256.hexdigest()


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_all(files: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of files by their names; several threads read them."""
    paths = list(files)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return {p.name: digest for p, digest in zip(paths, pool.map(sha256_of, paths), strict=True)}


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of all files in `folder` into its file SHA256SUMS."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    lines = [f"{digest}  {name}\n" for name, digest in sha256_of_all(files).items()]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 by file name in the SHA256SUMS of `folder`; empty without one.

    Raises:
        ValueError: a line is no digest and name of a file in the folder.
    """
    file, digests = folder / SUMS, {}
    if not file.is_file():
        return {}
    for number, line in enumerate(file.read_bytes().decode("utf-8", "replace").splitlines(), 1):
        found = re.fullmatch(r"([0-9a-f]{64}) [ *]([^/]+)", line)
        if found is None:
            raise ValueError(
                f"{file}, line {number}: {line[:80]!r} is not a SHA-256, two spaces and the name "
                "of a file: restore the file, or delete it to go on without digests"
            )
        digests[found[2]] = found[1]
    return digests


def refuse_damaged_sums(folder: Path) -> None:
    """Raise ValueError if a file of `folder` differs from its SHA256SUMS; pass without one."""
    damage = damaged_files(folder, read_sums(folder))
    if damage:
        raise ValueError(
            f"{folder} is damaged: {'; '.join(damage)} (from {SUMS}): copy or make the folder "
            f"again; if you changed the file yourself, delete {SUMS}"
        )


def damaged_files(folder: Path, expected: Mapping[str, str]) -> list[str]:
    """Return what is wrong with the files of `folder`, one text for each wrong file.

    Args:
        folder: folder of the files.
        expected: SHA-256 by file name.
    """

    def fault(name: str) -> str | None:
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            return f"file {name} cannot be read: {error.strerror or error}"
        if found == expected[name]:
            return None
        return f"file {name} has sha256 {found}, not {expected[name]}"

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return [text for text in pool.map(fault, sorted(expected)) if text is not None]
