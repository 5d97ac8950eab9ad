"""What a folder of tokens says about itself, and whether it is whole."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

FORMAT = 1
META = "meta.json"
TOKENIZER = "tokenizer.model"


@dataclass(frozen=True)
class Meta:
    """The contents of a token folder's meta.json.

    format: version of the folder's format. digest: sha256 over inputs and settings. vocab_size,
    eos_id, fingerprint (sha256 of the model file): of the tokenizer. documents, tokens: numbers
    by split. source: where the text came from, with the number of files, their bytes, and the
    digest of names, sizes and contents, and how many files of other endings were there
    ("left_out"). settings: what else the tokens depend on. empty: number of documents without a
    character, left out. skipped: what could not be read, each as {"file",
    "offset" (bytes), "reason"} and the "line" or "row". files: sizes of the folder's other files in
    bytes. kind: of the tokenizer; sentencepiece where an older folder does not say.
    """

    format: int
    digest: str
    vocab_size: int
    eos_id: int
    fingerprint: str
    documents: dict[str, int]
    tokens: dict[str, int]
    source: dict
    settings: dict
    empty: int
    skipped: list[dict]
    files: dict[str, int]
    kind: str = "sentencepiece"


def write_meta(folder: str | Path, meta: Meta) -> None:
    """Write meta.json; the last file of a token folder to be written."""
    text = json.dumps(dataclasses.asdict(meta), indent=1) + "\n"
    Path(folder, META).write_text(text, "utf-8")


def read_meta(folder: str | Path) -> Meta:
    """The meta.json of a token folder, after a check that all its files are whole.

    Raises ValueError where the folder or meta.json is missing (half-written), of another format,
    or where a file is missing or has another size.
    """
    remedy = "remove the folder and make it again with `lcdist tokenize`"
    if not Path(folder).is_dir():
        raise ValueError(f"data folder {folder}: no such folder; make it with `lcdist tokenize`")
    path = Path(folder, META)
    if not path.is_file():
        raise ValueError(
            f"data folder {folder}: no {META} in it, so it is half-written or not made by "
            f"`lcdist tokenize`; {remedy}"
        )
    try:
        table = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); {remedy}") from error
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        found = table.get("format") if isinstance(table, dict) else None
        raise ValueError(f"{path}: format {found!r}, this version reads {FORMAT}; {remedy}")
    names = {field.name: field.default for field in dataclasses.fields(Meta)}
    optional = {name for name, default in names.items() if default is not dataclasses.MISSING}
    if set(table) | optional != set(names):
        odd = ", ".join(sorted(set(names) ^ (set(table) | optional)))
        raise ValueError(f"{path}: missing or unknown keys: {odd}; {remedy}")
    meta = Meta(**table)
    for name, size in meta.files.items():
        file = Path(folder, name)
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise ValueError(f"{file}: {state}, {META} says {size} bytes; {remedy}")
    return meta


def check_vocabulary(meta: Meta, vocab_size: int, reserved: int = 0) -> None:
    """Raise ValueError unless the tokens fit the model's `vocab_size`.

    reserved: tokens that the model has on top, after those of the text: landmarks. The sizes must
    be the same, but with a Hugging Face tokenizer the model's may be larger: published ones pad it.
    """
    wanted = meta.vocab_size + reserved
    padded = meta.kind == "huggingface" and wanted < vocab_size
    if wanted != vocab_size and not padded:
        more = f" and {reserved} for landmarks" if reserved else ""
        retrain = (
            f", or tokenize again with vocab_size = {vocab_size - reserved}"
            if meta.kind == "sentencepiece"
            else ", or tokenize again with the model's own tokenizer"
        )
        raise ValueError(
            f"model.vocab_size = {vocab_size}, but the data was made with a tokenizer of "
            f"{meta.vocab_size} pieces{more}: set model.vocab_size = {wanted}{retrain}"
        )
