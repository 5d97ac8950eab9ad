"""Describe what went wrong to the user: errors of the operating system, and of one rank alone."""

import contextlib
import errno
import os
from collections.abc import Iterator

# What a user can do about an error of the operating system, by its number.
_REMEDIES = {
    errno.ENOSPC: "free some space there, or choose another folder; then run the command again",
    errno.EDQUOT: "free some of the quota, or choose another folder; then run the command again",
    errno.EACCES: "change its permissions, or choose another path",
    errno.EPERM: "change its permissions, or choose another path",
    errno.EROFS: "choose a path on a file system that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; choose another path",
    errno.EISDIR: "name a file, not a folder",
    errno.EEXIST: "remove it, or choose another path",
    errno.ENAMETOOLONG: "choose a shorter path: names have at most 255 bytes",
    errno.ELOOP: "correct the symbolic link, which leads back to itself",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ESTALE: "the network file system lost the file; run the command again",
    errno.EIO: "the disk or network failed; run the command again on another file system",
}
_SHOWN = 200


class RankError(ValueError):
    """A mistake that one rank finds and others may not, so that every rank has to report its own.

    Other errors are found by all ranks alike, and rank 0 reports them.
    """


def os_error_text(error: OSError) -> str:
    """Return one line for an error of the operating system: path, reason and remedy."""
    if error.errno is None:
        return str(error)
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None]
    reason = error.strerror or os.strerror(error.errno)
    remedy = _REMEDIES.get(error.errno)
    return ": ".join([*map(shortened, names[:1]), reason]) + (f"; {remedy}" if remedy else "")


def shortened(text: str) -> str:
    """Return `text` in at most about 200 characters, without its middle."""
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]}...{text[-half:]}"


def with_path(error: OSError, path: object) -> OSError:
    """Return `error` with a path, if it has none: writing to an open file names no file."""
    if error.filename is not None or error.errno is None:
        return error
    return OSError(error.errno, error.strerror, str(path))


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """Give errors of the operating system inside the block the path that is written."""
    try:
        yield
    except OSError as error:
        raise with_path(error, path) from error


_OF_RANK_ZERO = "raised by rank 0, which reports it"


def mark_of_rank_zero(error: BaseException) -> None:
    """Note in an error that rank 0 raised it and sent it to the other ranks."""
    error.add_note(_OF_RANK_ZERO)


def is_of_rank_zero(error: BaseException) -> bool:
    """Return whether `mark_of_rank_zero` has been called with this error."""
    return _OF_RANK_ZERO in getattr(error, "__notes__", ())
