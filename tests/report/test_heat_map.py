"""The heat map: every cell with its value, in colours whose text can be read."""

import math
import re
from typing import Any

import pytest

from lcdist.report.heat_map import Axis, heat_map

VALUES = [[1.0, 0.5], [0.0, None]]


def drawn(**more: Any) -> str:
    return str(
        heat_map(
            Axis("depth", ["0%", "<b>"]), Axis("length", ["512", "1,024"]), VALUES, "x", **more
        )
    )


def test_cells_have_their_values_and_missing_ones_a_dash() -> None:
    text = drawn()
    assert re.findall(r">([^<>]+)</text>", text)[:10] == [
        *("length", "depth", "0%", "100%", "50%", "&lt;b&gt;", "0%", "–", "512", "1,024")
    ]
    assert "<b>" not in text
    assert ">a<" in drawn(texts=[["a", "b"], ["c", "d"]])


def test_text_contrasts_with_its_cell() -> None:
    cells = re.findall(r'fill="(#\w{6})"/><text [^>]*fill="(#\w{6})"', drawn())
    assert len(cells) == 3
    for colours in cells:
        light, dark = sorted(map(luminance, colours), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_values_beyond_the_scale_get_its_ends_and_nan_is_empty() -> None:
    def colours(*values: float) -> list[str]:
        grid = heat_map(Axis("", ["a"]), Axis("", ["x"] * len(values)), [values], "", (0.0, 2.0))
        return re.findall(r'rx="2" fill="(#\w{6})"', str(grid))

    assert colours(-1.0, 0.0) == [colours(0.0)[0]] * 2
    assert colours(2.0, 9.0) == [colours(2.0)[0]] * 2
    assert colours(math.nan) == []


def test_a_missing_value_is_refused() -> None:
    with pytest.raises(ValueError, match="a value for each row and column"):
        heat_map(Axis("", ["a", "b"]), Axis("", ["x"]), [[1.0]], "")


def test_long_labels_have_the_room_that_they_take() -> None:
    def first_cell(label: str) -> float:
        grid = heat_map(Axis("", [label]), Axis("", ["x"]), [[1.0]], "")
        found = re.search(r'<rect x="([\d.]+)"', str(grid))
        assert found is not None
        return float(found[1])

    assert first_cell("a") == first_cell("a" * 9) > 80
    # Of the font's 11 pixels a letter takes 6 or so.
    assert first_cell("a" * 40) > 8 + 40 * 6.5
