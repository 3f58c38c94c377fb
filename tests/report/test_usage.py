from __future__ import annotations

import pytest

from rheostat.report import usage
from rheostat.report.style import drawing, png
from tests.report.sample import sample

TEXTS = sample()["texts"]


def test_shares_are_stacked_to_the_top():
    with drawing():
        figure = usage.by_layer(TEXTS)
        assert len(figure.axes) == 4
        top = max(patch.get_paths()[0].vertices[:, 1].max() for patch in figure.axes[0].collections)
        png(figure)
    assert top == pytest.approx(1)
    assert figure.axes[0].get_xlabel() == "layer"


def test_the_map_shows_every_layer_and_bin():
    with drawing():
        figure = usage.by_position(TEXTS)
        (image,) = figure.axes[0].get_images()
        png(figure)
    assert image.get_array().shape == (3, 3)
    assert image.get_clim() == (0.5, 1)
    assert tuple(image.get_extent()) == (0, 24, -0.5, 2.5)


def test_a_passage_is_drawn_with_all_its_characters():
    passage = TEXTS[0]["passage"]
    with drawing():
        figure = usage.by_token(passage, "words")
        png(figure)  # a character that the font lacks would warn, and warnings are errors here
    written = "".join(text.get_text() for text in figure.axes[0].texts)
    assert written == "The river↵é<b>▯▯"


def test_lines_are_no_longer_than_the_width():
    tokens = ["abc", " def", "\n\n", "x" * 25, "", "end"]
    lines = usage.wrap(tokens, 10)
    assert all(x + len(piece) <= 10 for line in lines for x, _, piece in line)
    assert "".join(piece for line in lines for _, _, piece in line) == "abc def↵↵" + "x" * 25 + "end"
    assert lines[0] == [(0, 0, "abc"), (3, 1, " def"), (7, 2, "↵")]


def test_ink_reads_on_its_ground():
    assert usage.colour_of(1.0, 0.25) == ("#fee838", usage.INK)
    assert usage.colour_of(0.25, 0.25) == ("#00224e", usage.LIGHT_INK)
    assert usage.colour_of(1.0, 1.0)[0] == "#fee838"
