"""Methods of installed packages are registered, or refused with an error that names them."""

import dataclasses
import importlib
from importlib.metadata import EntryPoint

import pytest

from lcdist.attention import METHODS, registry
from lcdist.attention.registry import GROUP, Methods, load_methods

MINE = dataclasses.replace(METHODS["full"], name="mine")
NOT_A_METHOD = "full"
LAYERS = dataclasses.replace(
    MINE, name="mine", options=dataclasses.make_dataclass("Options", [("layers", int, 1)])
)


def point(name: str, attribute: str, module: str = __name__) -> EntryPoint:
    return EntryPoint(name, f"{module}:{attribute}", GROUP)


def test_method_of_a_package_joins_the_built_in_methods() -> None:
    methods = load_methods([point("mine", "MINE")])
    assert methods["mine"] is MINE and methods["full"] is METHODS["full"]


def test_packages_are_loaded_when_a_method_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    def find(group: str) -> list[EntryPoint]:
        asked.append(group)
        return [point("mine", "MINE")]

    monkeypatch.setattr(registry, "entry_points", find)
    methods = Methods()
    assert asked == []
    assert methods["mine"] is MINE and list(methods)[-1] == "mine" and asked == [GROUP]


@pytest.mark.parametrize(
    ("points", "says"),
    [
        (
            [point("full", "METHOD", "lcdist.attention.full.attention")],
            "'full'.*taken by lcdist itself",
        ),
        ([point("mine", "MINE"), point("mine", "MINE")], "taken by an unnamed distribution"),
        ([point("mine", "NOT_A_METHOD")], "is a str, expected an AttentionMethod"),
        ([point("yours", "MINE")], "its method is named 'mine'"),
        ([point("mine", "LAYERS")], r"its option 'layers' has the name of a key of \[attention\]"),
        ([point("mine", "GONE")], "cannot be imported.*GONE"),
        ([point("mine", "MINE", "no_such_module")], "cannot be imported.*no_such_module"),
    ],
)
def test_wrong_entry_point_is_named(points: list[EntryPoint], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_methods(points)


@pytest.mark.parametrize(
    ("path", "name"), [("common", "check_plain"), ("common", "tokens"), ("method", "HeadSlice")]
)
def test_released_import_paths_still_work_and_warn(path: str, name: str) -> None:
    module = importlib.import_module(f"lcdist.attention.{path}")
    with pytest.warns(DeprecationWarning, match=f"{path}.{name}: import it from"):
        assert callable(getattr(module, name))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = module.no_such_name
