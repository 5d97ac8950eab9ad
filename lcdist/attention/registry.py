"""All attention methods by name: the built-in ones and those that installed packages bring.

A package brings one by an entry point in the group `lcdist.attention_methods`: its name is the
method's, its value `module:METHOD`.
"""

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

from lcdist.attention import coca, full, landmark, lssar, scca, tensorized
from lcdist.attention.interface import AttentionMethod

GROUP = "lcdist.attention_methods"
BUILT_IN = (full.METHOD, coca.METHOD, scca.METHOD, tensorized.METHOD, landmark.METHOD, lssar.METHOD)


def load_methods(points: Iterable[EntryPoint]) -> dict[str, AttentionMethod]:
    """The built-in methods and those of `points`, by name.

    Raises ValueError, naming the entry point and its distribution, where one cannot be imported,
    is not an AttentionMethod, is named otherwise than its method, or takes a name that is taken.
    """
    methods = {method.name: method for method in BUILT_IN}
    origins = dict.fromkeys(methods, "lcdist itself")
    for point in points:
        origin = point.dist.name if point.dist else "an unnamed distribution"
        where = f"entry point {point.name!r} = {point.value!r} of {origin} (group {GROUP})"
        try:
            method = point.load()
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"{where}: cannot be imported: {error}; mend or uninstall it"
            ) from error
        if not isinstance(method, AttentionMethod):
            raise ValueError(f"{where}: is a {type(method).__name__}, expected an AttentionMethod")
        if method.name != point.name:
            raise ValueError(f"{where}: the method calls itself {method.name!r}; names must agree")
        if method.name in methods:
            raise ValueError(
                f"{where}: the name is taken by {origins[method.name]}; rename or uninstall one"
            )
        methods[method.name] = method
        origins[method.name] = origin
    return methods


METHODS: dict[str, AttentionMethod] = load_methods(entry_points(group=GROUP))
