from __future__ import annotations

import xml.etree.ElementTree as ET

import matplotlib
import pytest

from rheostat.report import style


def plotted(title: str = "a title") -> object:
    figure, panels = style.grid(1, style.PANEL_INCHES)
    panels[0].plot([0, 1], [1, 2], color=style.INK, label="line", marker="o")
    panels[0].set_title(title)
    style.plain_axes(panels[0])
    style.legend_below(figure, panels)
    return figure


def test_settings_hold_inside_the_block_only():
    before = matplotlib.rcParams["svg.hashsalt"]
    with style.drawing():
        assert matplotlib.rcParams["svg.hashsalt"] == "rheostat"
    assert matplotlib.rcParams["svg.hashsalt"] == before


def test_the_same_figure_is_the_same_bytes():
    with style.drawing():
        assert style.png(plotted()) == style.png(plotted())
        assert style.svg(plotted(), "a", "b") == style.svg(plotted(), "a", "b")


def test_a_drawing_for_a_page():
    with style.drawing():
        text = style.svg(plotted("<i>$x_1$ & more"), "here", 'what "it" shows')
    root = ET.fromstring(text)
    assert root.get("role") == "img"
    assert root.get("aria-label") == 'what "it" shows'
    assert "<i>" not in text
    assert any(one.text == "<i>$x_1$ & more" for one in root.iter())  # no mathematics was made of it
    assert style.INK not in text
    assert "var(--ink)" in text
    assert "metadata" not in text
    ids = [one.get("id") for one in root.iter() if one.get("id")]
    assert ids
    assert all(one.startswith("here-") for one in ids)
    used = [value for one in root.iter() for key, value in one.items() if key.endswith("href")]
    assert used
    assert all(one.startswith("#here-") and one[1:] in ids for one in used)


def test_unused_places_in_a_grid_stay_empty():
    figure, panels = style.grid(3, (2, 2))
    assert len(panels) == 3
    assert [axis.axison for axis in figure.axes] == [True, True, True, False]


@pytest.mark.parametrize(
    ("text", "wanted"), [("plain é Ω", "plain é Ω"), ("漢\x00\n", "▯▯▯"), ("$x$", "$x$"), ("\U0001f600", "▯")]
)
def test_characters_that_the_font_lacks_are_boxes(text: str, wanted: str):
    assert style.drawable(text) == wanted


def test_shorten():
    assert style.shorten("x" * 40) == "x" * 40
    assert style.shorten("x" * 41) == "x" * 39 + "…"
