"""The console that commands print to."""

from rich.console import Console


def plain_console(highlight: bool = True, soft_wrap: bool = False) -> Console:
    """Return a console that prints text as it is.

    Names of folders and words of a configuration may look like rich's markup or emoji: `[red]`.

    Args:
        highlight: colour numbers and paths on terminals.
        soft_wrap: leave long lines whole.
    """
    return Console(markup=False, emoji=False, highlight=highlight, soft_wrap=soft_wrap)
