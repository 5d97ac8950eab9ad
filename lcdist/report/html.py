"""Render the report's page with Jinja2; all text is escaped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_environment = Environment(
    loader=PackageLoader("lcdist.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True)
class Table:
    """A table of text cells; the first column names the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """An `<svg>` element and its caption."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Shares:
    """The division of a total into parts, at most four.

    Attributes:
        parts: names of the parts.
        rows: percentages of the parts by row name.
    """

    parts: Sequence[str]
    rows: Mapping[str, Sequence[float]]


def render_report(**sections: Any) -> str:
    """Return the HTML document. `sections` are the variables of templates/report.html."""
    return _environment.get_template("report.html").render(sections)
