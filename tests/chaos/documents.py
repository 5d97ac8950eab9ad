"""Generate documents for `lcdist tokenize`: any bytes in any of its formats."""

import gzip
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st

from lcdist.commands.main import main
from lcdist.data.meta import Meta, read_meta
from lcdist.data.prepare.corpus import SUFFIXES
from lcdist.data.prepare.indexed import check_index
from lcdist.data.tokenizers.byte_tokenizer import ByteTokenizer
from tests.chaos.inputs import BYTE_CHANGES, Kind, changed
from tests.chaos.stdio import output_to
from tests.chaos.tally import REFUSED

MEANING = (
    "the account adds up (files seen = read + left out; tokens and documents of `meta.json` are "
    "those in the files; undamaged texts come back exactly), or `error:` lines that name the file "
    "or say that no document is left"
)
FORMATS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
        st.sampled_from(["", " ", "\n", "\r\n\n\n", "\x00", "\u2028", "</s>", "\ufeff", "a" * 300]),
    ),
    min_size=1,
    max_size=6,
)
NAMES = st.sampled_from(["a", "b c", "é", "[red]x[/red]", "-x", "n" * 200, ".hidden", "in/d"])


@st.composite
def folders(draw: st.DrawFn) -> dict[str, Any]:
    """Generate up to three files, and settings."""
    files = {}
    for _ in range(draw(st.integers(1, 3))):
        suffix = draw(st.sampled_from([*FORMATS, *FORMATS, ".png"]))
        damaged = draw(st.sampled_from([False, False, True]))
        content = {"texts": draw(TEXTS), "changes": draw(BYTE_CHANGES) if damaged else []}
        if draw(st.integers(0, 5)) == 0:
            content = {"bytes": draw(st.binary(max_size=60)).decode("latin-1"), "changes": []}
        files[draw(NAMES) + suffix] = content
    settings = {
        "--on-error": draw(st.sampled_from(["skip", "skip", "refuse"])),
        "--valid-fraction": str(draw(st.sampled_from([0, 0, 0, 0.4]))),
        "--field": draw(st.sampled_from(["text"] * 5 + ["other"])),
    }
    return {"files": files, "settings": settings}


def encoded(suffix: str, texts: list[str]) -> bytes:
    """Return a file of this format with the texts."""
    if suffix == ".parquet":
        stream = io.BytesIO()
        table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())})
        pyarrow.parquet.write_table(table, stream, row_group_size=2)
        return stream.getvalue()
    if suffix in (".txt", ".png"):
        return "\n".join(texts).encode()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if suffix.endswith(".gz"):
        return gzip.compress(lines, mtime=0)
    return pyarrow.compress(lines, "zstd", asbytes=True) if suffix.endswith(".zst") else lines


def attempt(value: Any, folder: Path) -> str | None:
    """Write the files and tokenize them; return what went wrong."""
    source, out, printed = folder / "source", folder / "out", folder / "printed"
    for name, content in value["files"].items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        suffix = next((s for s in reversed(FORMATS) if name.endswith(s)), ".png")
        whole = content.get("bytes", "").encode("latin-1")
        if "texts" in content:
            whole = encoded(suffix, content["texts"])
        path.write_bytes(changed(whole, content["changes"]))
    words = ["tokenize", str(source), str(out), "--tokenizer", "bytes", "--workers", "1"]
    with output_to(printed):
        status = main([*words, *(part for pair in value["settings"].items() for part in pair)])
    if status == 0:
        return _account(value, source, read_meta(out), out)
    text = printed.read_text()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if out.exists():
        return "an error, and a folder of tokens nevertheless"
    names = [Path(name).name for name in value["files"]]
    named = any(name in text for name in (*names, str(source), "split has no document"))
    return REFUSED if errors and named else f"exit status {status}: {' '.join(text.split())[-300:]}"


def _account(value: Any, source: Path, meta: Meta, out: Path) -> str | None:
    """Return what does not add up."""
    seen = sum(len(names) for _, _, names in os.walk(source))
    hidden = sum(name.startswith(".") for name in value["files"])
    listed, left_out = meta.source["files"], sum(meta.source["left_out"].values())
    if meta.source["seen"] != listed + left_out or meta.source["seen"] != seen:
        return f"{seen} files, {meta.source['seen']} seen, {listed} read, {left_out} left out"
    texts: Counter[str] = Counter()
    for split, tokens in meta.tokens.items():
        check_index(out / split)
        found = _texts(out / split)
        texts.update(found)
        if len(found) != meta.documents[split]:
            return f"{len(found)} documents in {split}, {meta.documents[split]} in meta.json"
        if (out / f"{split}.bin").stat().st_size != 2 * tokens:
            return f"{tokens} tokens of {split} in meta.json, and another size of its file"
    if any(c["changes"] or "bytes" in c for c in value["files"].values()) or hidden:
        return None
    wanted = Counter(
        text
        for name, content in value["files"].items()
        for text in content["texts"]
        if text and name.endswith(SUFFIXES) and not name.endswith(".txt")
    )
    # Plain text is joined and cut elsewhere, so only records can be compared.
    lost = wanted - texts if value["settings"]["--field"] == "text" else None
    return f"lost: {sorted(lost)}" if lost else None


def _texts(prefix: Path) -> list[str]:
    """Return the documents of a split, read without the code that wrote them."""
    index = Path(f"{prefix}.idx").read_bytes()
    count = int.from_bytes(index[18:26], "little")
    lengths = np.frombuffer(index, np.int32, count, 34)
    tokens, tokenizer, first = np.fromfile(f"{prefix}.bin", np.uint16), ByteTokenizer(), 0
    found = []
    for length in lengths:
        found.append(tokenizer.decode(tokens[first : first + length].tolist()))
        first += length
    return found


DOCUMENTS = Kind("documents", MEANING, 1000, folders(), attempt)
