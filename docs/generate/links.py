"""Find and replace the targets of links in Markdown text."""

import re
from collections.abc import Callable, Iterator

# A fenced block, a comment or a code span, which have no links; or a link or picture.
_TOKENS = re.compile(
    r"(?P<fence>^(?P<marks>`{3,}|~{3,}).*?^(?P=marks)[ \t]*$)"
    r"|(?P<comment><!--.*?-->)"
    r"|(?P<code>(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))"
    r"|(?P<begin>\]\()(?P<target>[^)\s]+)(?P<end>(?:\s+\"[^\"]*\")?\))",
    re.MULTILINE | re.DOTALL,
)


def replace_targets(markdown: str, change: Callable[[str], str]) -> str:
    """Return the text with `change(target)` in place of the target of each link and picture."""

    def replace(found: re.Match[str]) -> str:
        if found["target"] is None:
            return found[0]
        return f"{found['begin']}{change(found['target'])}{found['end']}"

    return _TOKENS.sub(replace, markdown)


def link_targets(markdown: str) -> Iterator[str]:
    """Yield the target of each link and picture of a text, in order."""
    yield from (found["target"] for found in _TOKENS.finditer(markdown) if found["target"])


def is_external(target: str) -> bool:
    """Return whether a target has a scheme, or is an anchor of its own page."""
    return target.startswith("#") or re.match(r"[a-z][a-z0-9+.-]*:", target) is not None
