"""Send what this process prints, from Python and from libraries, to a file."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path


@contextmanager
def output_to(file: Path, append: bool = False) -> Iterator[None]:
    """Within, standard output and standard error are `file`."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    # A test runner replaces sys.stdout, so both the objects and the descriptors are changed.
    with (
        file.open("a" if append else "w", encoding="utf-8", errors="backslashreplace") as stream,
        redirect_stdout(stream),
        redirect_stderr(stream),
    ):
        try:
            for number in (1, 2):
                os.dup2(stream.fileno(), number)
            yield
        finally:
            stream.flush()
            for number, before in zip((1, 2), kept, strict=True):
                os.dup2(before, number)
                os.close(before)
