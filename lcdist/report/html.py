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
    """A table of text cells.

    Attributes:
        head: titles of the columns.
        rows: cells; the first of each row names it.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        svg: an `<svg>` element.
        caption: the text below it.
    """

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
    return render("report.html", **sections)


def render(template: str, **variables: Any) -> str:
    """Return the HTML document of a template with its variables."""
    return _environment.get_template(template).render(variables)
