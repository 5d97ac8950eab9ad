"""Read what the configuration's dataclasses say of their keys: docstrings and comments."""

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Mapping

# A comment above a field is the field's if no blank line or other field stands between.
_COMMENT = re.compile(r"^\s*# ?(.*)$")


def key_docs(cls: type) -> Mapping[str, str]:
    """Return what is said of each field of a dataclass: in its docstring, or in a comment."""
    source = textwrap.dedent(inspect.getsource(cls))
    [node] = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    lines = source.splitlines()
    said = attribute_docs(inspect.getdoc(cls) or "")
    found = {}
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            name = field.target.id
            found[name] = said.get(name) or _comment(field, lines)
    return {field.name: found.get(field.name, "") for field in dataclasses.fields(cls)}


def attribute_docs(docstring: str) -> dict[str, str]:
    """Return the entries under `Attributes:` of a docstring, each as one line."""
    _, mark, section = docstring.partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines() if mark else ():
        if not line.strip():
            break
        begin = re.match(r"^ {4}(\w+): (.*)$", line)
        if begin:
            name = begin[1]
            found[name] = begin[2].strip()
        else:
            found[name] += " " + line.strip()
    return found


def summary(cls: type) -> str:
    """Return the docstring of a class without its sections."""
    text = inspect.getdoc(cls) or ""
    return re.split(r"\n\n(?=[A-Z]\w+:\n)", text)[0]


def _comment(field: ast.AnnAssign, lines: list[str]) -> str:
    """Return the comment above a field, or the one behind it."""
    above: list[str] = []
    number = field.lineno - 2
    while number >= 0 and (found := _COMMENT.match(lines[number])):
        above.insert(0, found[1])
        number -= 1
    assert field.end_lineno is not None and field.end_col_offset is not None
    behind = lines[field.end_lineno - 1][field.end_col_offset :]
    found = re.match(r"^\s*# ?(.*)$", behind)
    return " ".join([*above, *([found[1]] if found else [])]).strip()
