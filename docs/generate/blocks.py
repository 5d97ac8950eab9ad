"""Replace the lines `<!-- make: NAME -->` of a page by what is made under that name."""

import re
from collections.abc import Callable, Mapping

from docs.generate.configuration import configuration_reference

_LINE = re.compile(r"^<!-- make: ([\w-]+) -->$", re.MULTILINE)

MAKERS: Mapping[str, Callable[[], str]] = {"configuration": configuration_reference}


def fill(markdown: str, origin: str, makers: Mapping[str, Callable[[], str]] = MAKERS) -> str:
    """Return the text of the page `origin` with every such line replaced.

    Links of what is made are those of the page's own file.

    Raises:
        ValueError: A line names what nothing makes.
    """

    def replace(found: re.Match[str]) -> str:
        if found[1] not in makers:
            legal = ", ".join(makers)
            raise ValueError(f"{origin}: nothing makes {found[1]!r}; there are {legal}")
        return makers[found[1]]()

    return _LINE.sub(replace, markdown)
