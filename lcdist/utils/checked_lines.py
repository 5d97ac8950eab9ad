"""Lines of JSON that end with a CRC-32 of the rest: a digit with a flipped bit may be a digit."""

import re
import zlib

# How a line ends.
_CHECKSUM = re.compile(r', "crc32": "([0-9a-f]{8})"\}$')


class ChecksumError(ValueError):
    """A line differs from its checksum, which is the message."""


def with_checksum(text: str) -> str:
    """Return an object's JSON, on one line and not empty, with its checksum as the last key."""
    return f'{text[:-1]}, "crc32": "{_checksum(text)}"}}'


def without_checksum(line: str) -> tuple[str, bool]:
    """Return what `with_checksum` was given, and whether the line has a checksum.

    Raises:
        ChecksumError: the line differs from its checksum.
    """
    found = _CHECKSUM.search(line)
    if found is None:
        return line, False
    text = line[: found.start()] + "}"
    if _checksum(text) != found[1]:
        raise ChecksumError(found[1])
    return text, True


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
