"""The console that commands print to."""

from rich.console import Console


def plain_console(**options: bool) -> Console:
    """Return a console that prints text as it is.

    Names of folders and words of a configuration may look like rich's markup or emoji: `[red]`.
    """
    return Console(markup=False, emoji=False, **options)
