"""Generate inputs, try each, and keep those that failed as small files that are tried first."""

import contextlib
import hashlib
import json
import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.chaos.tally import REFUSED, Tally, told

CORPUS = Path(__file__).parent / "corpus"
# One attempt may take this long and this much more memory; work on absurd numbers is bounded.
SECONDS = 20
BYTES = 4 * 2**30


@dataclass(frozen=True)
class Kind:
    """A kind of generated input.

    Attributes:
        name: plural.
        meaning: what "survived" means.
        count: how many are tried in full.
        inputs: generates inputs, which are values that JSON can write (bytes as Latin-1 text).
        attempt: tries one in an empty folder; returns what went wrong, None if it was accepted and
            REFUSED if it was refused in order.
    """

    name: str
    meaning: str
    count: int
    inputs: st.SearchStrategy
    attempt: Callable[[Any, Path], str | None]

    @property
    def folder(self) -> str:
        """Name of its folder in the corpus."""
        return self.name.lower().replace(" ", "-")


def try_inputs(
    kind: Kind, count: int, with_seed: int, keep: Path | None = None, replay: bool = True
) -> Tally:
    """Try the inputs in the corpus, then `count` new ones.

    Args:
        kind: of the inputs.
        count: number of new inputs.
        with_seed: of hypothesis.
        keep: folder that gets a file for each new input that failed; None: they are not kept.
        replay: whether to begin with the corpus.
    """
    tally = Tally(kind.name, kind.meaning)
    for file in sorted((CORPUS / kind.folder).glob("*.json")) if replay else []:
        problem = _attempt(kind, json.loads(file.read_text(encoding="utf-8")))
        tally.add(told(problem, f"corpus/{kind.folder}/{file.name}"))

    @seed(with_seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.inputs)
    def each(value: Any) -> None:
        problem = _attempt(kind, value)
        tally.add(told(problem, _shown(value)))
        if problem not in (None, REFUSED) and keep is not None:
            keep_input(keep / kind.folder, value)

    if count:
        each()
    return tally


def keep_input(folder: Path, value: Any) -> Path:
    """Write an input to `folder`, under a name made of its content."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1)
    file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    file.write_text(text + "\n", encoding="utf-8")
    return file


def _attempt(kind: Kind, value: Any) -> str | None:
    folder = Path(tempfile.mkdtemp(prefix="lcdist-chaos-"))
    try:
        with _bounded():
            return kind.attempt(value, folder)
    except BaseException as error:
        # pyo3's panics are no Exceptions.
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:200]}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Within, raise TimeoutError after `SECONDS` and MemoryError beyond `BYTES` more."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + BYTES
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


# --- changes that several kinds make --------------------------------------------------------------

# Values of a wrong type, size or form, for a key of JSON or TOML.
ABSURD = st.one_of(
    st.sampled_from([None, True, False, "", "x", [], {}, [[]], {"a": {}}, "\x00", "é" * 300]),
    st.sampled_from([0, 1, -1, 2, 7, 2**31, 2**63, 10**15, 10**27, -(10**18)]),
    st.sampled_from([0.0, 0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), -1.5]),
    st.lists(st.integers(-3, 9), max_size=4),
)
# Changes of bytes: (what, place in [0, 1), value). `changed` makes them.
BYTE_CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "zero", "remove"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
    ),
    max_size=4,
)


def changed(content: bytes, changes: list) -> bytes:
    """Return `content` after the changes of a `BYTE_CHANGES`."""
    data = bytearray(content)
    for what, place, value in changes:
        at = int(place * len(data))
        if what == "flip" and data:
            data[at] ^= 1 << (value % 8)
        elif what == "cut":
            del data[at:]
        elif what == "insert":
            data[at:at] = bytes([value]) * (1 + value % 5)
        elif what == "zero":
            data[at : at + value] = bytes(len(data[at : at + value]))
        elif what == "remove":
            del data[at : at + 1 + value % 16]
    return bytes(data)
