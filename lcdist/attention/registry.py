"""`METHODS`: all attention methods by name, built in or from installed packages.

A package adds a method with an entry point in the group `lcdist.attention_methods`. The entry
point has the method's name and the value `module:METHOD`.
"""

from collections import UserDict
from collections.abc import Iterable
from dataclasses import fields
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points

from lcdist.attention import coca, full, landmark, lssar, scca, tensorized
from lcdist.attention.interface import AttentionMethod
from lcdist.config.schema import AttentionConfig

GROUP = "lcdist.attention_methods"
BUILT_IN = (full.METHOD, coca.METHOD, scca.METHOD, tensorized.METHOD, landmark.METHOD, lssar.METHOD)


def load_methods(points: Iterable[EntryPoint]) -> dict[str, AttentionMethod]:
    """Return the built-in methods and those of the entry points `points`, by name.

    Raises ValueError if an entry point cannot be imported, is not an AttentionMethod, has another
    name than its method, repeats a name, or has an option that is a key of `[attention]` already.
    The message names the entry point and its distribution.
    """
    methods = {method.name: method for method in BUILT_IN}
    origins = dict.fromkeys(methods, "lcdist itself")
    for point in points:
        origin = point.dist.name if point.dist else "an unnamed distribution"
        place = f"entry point {point.name!r} = {point.value!r} of {origin} (group {GROUP})"
        try:
            method = point.load()
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"{place}: cannot be imported: {error}; fix or uninstall it"
            ) from error
        if not isinstance(method, AttentionMethod):
            raise ValueError(f"{place}: is a {type(method).__name__}, expected an AttentionMethod")
        if method.name != point.name:
            raise ValueError(
                f"{place}: its method is named {method.name!r}; the two names must agree"
            )
        if method.name in methods:
            raise ValueError(
                f"{place}: the name is taken by {origins[method.name]}; rename or uninstall one"
            )
        keys = {key.name for key in fields(AttentionConfig)}
        taken = [option.name for option in fields(method.options) if option.name in keys]
        if taken:
            raise ValueError(
                f"{place}: its option {taken[0]!r} has the name of a key of [attention]; rename it"
            )
        methods[method.name] = method
        origins[method.name] = origin
    return methods


class Methods(UserDict[str, AttentionMethod]):
    """All methods by name. Entry points are loaded when the first method is looked up.

    A package of a method imports lcdist. If this module loaded the package, a program that imports
    the package first would find it half made.
    """

    def __init__(self) -> None:
        """Load nothing; `UserDict` would make `data` here."""

    @cached_property
    def data(self) -> dict[str, AttentionMethod]:
        """The methods, as `UserDict` keeps them."""
        return load_methods(entry_points(group=GROUP))


METHODS = Methods()
