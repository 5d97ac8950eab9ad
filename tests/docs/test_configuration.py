"""The reference of the configuration names and explains every key of the schema."""

import dataclasses
import re
from pathlib import Path

from docs.generate.configuration import configuration_reference, documented_keys
from docs.generate.schema_docs import attribute_docs, key_docs
from lcdist.config import dump
from lcdist.config.overrides import merge_overrides
from lcdist.config.stages import load_stages

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


@dataclasses.dataclass(frozen=True)
class Example:
    """An example.

    It has keys.

    Attributes:
        first: Said in the
            docstring.
    """

    first: int = 1
    # above
    second: int = 2  # and behind
    third: tuple[int, ...] = (1, 2)  # "# in text"

    fourth: str = "#"


def test_a_key_is_explained_in_the_docstring_or_in_a_comment() -> None:
    assert key_docs(Example) == {
        "first": "Said in the docstring.",
        "second": "above and behind",
        "third": '"# in text"',
        "fourth": "",
    }
    assert attribute_docs("Nothing.") == {}


def sections() -> dict[str, list[list[str]]]:
    """Return the rows of each section of the reference, by the table that it is about."""
    found: dict[str, list[list[str]]] = {}
    for part in re.split(r"^#{2,3} ", configuration_reference(), flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        table = re.search(r"`\[([\w.]+)\]`", heading)
        name = table[1] if table else "attention" if heading.startswith("Options") else ""
        rows = re.findall(r"^\| `\w+` .*\|$", body, re.MULTILINE)
        found.setdefault(name, []).extend(re.split(r"(?<!\\) \| ", row.strip("| ")) for row in rows)
    return found


def test_every_key_is_listed_and_explained() -> None:
    rows = [(table, row) for table, listed in sections().items() for row in listed]
    named = {f"{table}.{row[0].strip('`')}".removesuffix(".NAME") for table, row in rows}
    tables = {"model.rope", "model.rope.scaling", "data.mixture"}
    missing = {key for key in documented_keys() - named - tables if "mixture" not in key}
    assert not missing
    assert not [row for _, row in rows if len(row) != 4 or not row[3]]
    assert {"model.from", "model.rope.extend", "train.seqlen", "attention.top_k"} <= named


def test_the_keys_of_a_dumped_configuration_are_listed() -> None:
    config = Path(__file__).parents[2] / "configs" / "debug" / "full.toml"
    text, reference = dump(load_stages(config)[0].config), configuration_reference()
    keys = re.findall(r"^(\w+) =", text, re.MULTILINE)
    assert len(keys) > 80
    assert not [
        key
        for key in keys
        if f"`{key}`" not in reference and f"`{key} " not in reference and key != "scaling"
    ]


def test_the_examples_of_the_page_are_legal(tmp_path: Path) -> None:
    run, stages = re.findall(r"^```toml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for number, text in enumerate((run, run + stages)):
        file = tmp_path / f"{number}.toml"
        file.write_text(text)
        assert [stage.name for stage in load_stages(file)] == [[""], ["short", "long"]][number]
    errors: list[str] = []
    merge_overrides({}, ["evaluate.lengths=[512,1024]", "checkpoint.load="], errors)
    assert not errors
