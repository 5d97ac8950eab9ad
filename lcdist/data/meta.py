"""Read, write and check meta.json, the description of a token folder."""

import dataclasses
import json
import re
import typing
from dataclasses import dataclass
from pathlib import Path

from lcdist.utils.errors import naming
from lcdist.utils.json_file import check_types, read_json

FORMAT = 1
META = "meta.json"
REMAKE = "remove the folder and make it again with `lcdist tokenize`"


@dataclass(frozen=True)
class Meta:
    """Contents of a token folder's meta.json.

    Attributes:
        format: version of the folder's format.
        digest: sha256 over inputs and settings.
        vocab_size: number of tokens of the tokenizer.
        eos_id: token that ends a document.
        fingerprint: sha256 of the tokenizer's files.
        documents: number of documents by split.
        tokens: number of tokens by split.
        source: path, number of files read ("files"), their bytes, the digest of their names, sizes
            and contents, the number of files seen ("seen"), and the number of those left out by
            reason ("left_out"). Seen are those read and those left out.
        settings: other settings that determine the tokens.
        empty: number of documents without a character; these are left out.
        skipped: unreadable documents, each as {"file", "offset" (bytes), "reason"} and "line" or
            "row".
        files: sizes in bytes of the folder's other files.
        kind: kind of the tokenizer; older folders do not record it and use sentencepiece.
        sha256: digests of the folder's other files; None for older folders.
        targets: number of tokens to predict by split, the answers of conversations; None: all.
        lengths: by split, its longest document ("longest"), and a list ("at_least") of [n,
            documents of at least n tokens, their tokens]; None for older folders.
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
    sha256: dict[str, str] | None = None
    targets: dict[str, int] | None = None
    lengths: dict[str, dict] | None = None


def write_meta(folder: str | Path, meta: Meta) -> None:
    """Write meta.json. It has to be the last file written to a token folder."""
    text = json.dumps(dataclasses.asdict(meta), indent=1) + "\n"
    with naming(Path(folder, META)):
        Path(folder, META).write_text(text, "utf-8")


def read_meta(folder: str | Path) -> Meta:
    """Read meta.json of a token folder and check that all files are complete.

    Raises:
        ValueError: the folder or meta.json is missing (the folder is incomplete), meta.json has
            another format or types, or a file is missing or has another size.
    """
    if not Path(folder).is_dir():
        raise ValueError(
            f"data.path = '{folder}': no such folder; make it with 'lcdist tokenize TEXT {folder} "
            "--tokenizer MODEL', or name another one"
        )
    path = Path(folder, META)
    if not path.is_file():
        raise ValueError(
            f"data folder {folder}: it has no {META}, so it is incomplete or was not made by "
            f"`lcdist tokenize`; {REMAKE}"
        )
    table = read_json(path, REMAKE)
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        version = table.get("format") if isinstance(table, dict) else None
        raise ValueError(f"{path}: format {version!r}, this version reads {FORMAT}; {REMAKE}")
    defaults = {field.name: field.default for field in dataclasses.fields(Meta)}
    optional = {name for name, value in defaults.items() if value is not dataclasses.MISSING}
    if set(table) | optional != set(defaults):
        wrong = ", ".join(sorted(set(defaults) ^ (set(table) | optional)))
        raise ValueError(f"{path}: missing or unknown keys: {wrong}; {REMAKE}")
    hints = typing.get_type_hints(Meta)
    check_types(table, {name: hints[name] for name in table}, str(path), REMAKE)
    meta = Meta(**table)
    _check_digests(meta, path)
    for name, expected_size in meta.files.items():
        file = Path(folder, name)
        size = file.stat().st_size if file.is_file() else None
        if size != expected_size:
            state = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(f"{file}: {state}, {META} says {expected_size} bytes; {REMAKE}")
    return meta


def _check_digests(meta: Meta, path: Path) -> None:
    """Raise ValueError unless meta.json has a SHA-256 for each file that it lists, or none."""
    if not meta.sha256:
        return
    if set(meta.sha256) != set(meta.files):
        names = ", ".join(sorted(set(meta.sha256) ^ set(meta.files)))
        raise ValueError(f"{path}: files and sha256 do not name the same files ({names}); {REMAKE}")
    for name, digest in meta.sha256.items():
        if re.fullmatch("[0-9a-f]{64}", digest) is None:
            raise ValueError(f"{path}: sha256 of {name} is {digest!r}, not a SHA-256; {REMAKE}")


def check_vocabulary(meta: Meta, vocab_size: int, reserved: int = 0) -> None:
    """Raise ValueError unless the tokens of a folder match the model's vocabulary.

    The sizes must be equal, except with a Hugging Face tokenizer: published models pad their
    vocabulary, so the model's may be larger.

    Args:
        meta: description of the token folder.
        vocab_size: vocabulary size of the model.
        reserved: tokens that the model has in addition to those of the text (landmarks).
    """
    required = meta.vocab_size + reserved
    padded = meta.kind == "huggingface" and required < vocab_size
    if required != vocab_size and not padded:
        landmarks = f" and {reserved:d} for landmarks" if reserved else ""
        if reserved and vocab_size == meta.vocab_size:
            raise ValueError(
                f"model.vocab_size = {vocab_size}, and the data was made with a tokenizer of as "
                "many pieces: landmark attention wants one more token; set model.vocab_size = "
                f"{required}, and import a model to start from with --extra-tokens {reserved:d}"
            )
        alternative = (
            f", or tokenize again with --vocab-size {vocab_size - reserved}"
            if meta.kind == "sentencepiece"
            else ", or tokenize again with the model's own tokenizer"
        )
        raise ValueError(
            f"model.vocab_size = {vocab_size}, but the data was made with a tokenizer of "
            f"{meta.vocab_size} pieces{landmarks}: set model.vocab_size = {required}{alternative}"
        )
