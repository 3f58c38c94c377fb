"""The one look of all pictures: colours, sizes, and files that are the same bytes for the same report.

Colours of series are Okabe and Ito's, which colour-blind readers tell apart; each series has a marker too. Amounts
(FFN widths) are shades of cividis, dark and blue for little, light and yellow for much, as on the terminal.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, QUIET, GRID, PAPER = "#1b1b1b", "#6f6f6f", "#dcdcdc", "#ffffff"
DIAL_STYLE = {"color": "#0072B2", "marker": "o", "linewidth": 2.0, "markersize": 6.0, "zorder": 3}
RIVAL_STYLES = (("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))
"""Colour and marker of each baseline, in order."""
SERIES_STYLES = (("#0072B2", "o"), *RIVAL_STYLES)
"""Of models, of tasks, of sides: whatever is on equal terms."""
FRONT_STYLE = {"color": "#F0E442", "linewidth": 9.0, "alpha": 0.55, "zorder": 1, "solid_capstyle": "round"}

DPI = 160
"""A picture of 10 inches is 1600 pixels, twice the width at which a README shows it."""
PANEL_INCHES = (5.2, 3.9)
COLUMNS = 2
"""Panels beside each other, at most; more become too small to read in a README."""

SETTINGS = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so that pictures do not depend on the machine
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.labelsize": 10.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.parse_math": False,  # names of files may hold dollar signs
    "svg.fonttype": "none",
    "svg.hashsalt": "rheostat",
}

CSS_COLOURS = {
    INK: "var(--ink)",
    QUIET: "var(--quiet)",
    GRID: "var(--grid)",
    PAPER: "var(--paper)",
    "#0072b2": "var(--dial)",
    "#f0e442": "var(--front)",
}
"""What a picture inside a page takes from the page, so that it follows light and dark."""


@contextmanager
def drawing() -> Iterator[None]:
    """Our settings hold inside the block, in which figures are made and saved, and nowhere else."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches; not one of pyplot's, which keeps them and may look for a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def grid(num_panels: int, size: tuple[float, float], columns: int = COLUMNS, extra: float = 0.0) -> tuple[Figure, Any]:
    """A figure and its `num_panels` axes, row by row, each about `size` inches; `extra` inches for a legend."""
    num_columns = min(columns, num_panels)
    num_rows = -(-num_panels // num_columns)
    figure = new_figure(size[0] * num_columns, size[1] * num_rows + extra)
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for unused in panels[num_panels:]:
        unused.set_axis_off()
    return figure, list(panels[:num_panels])


def plain_axes(panel: Any) -> None:
    """Two spines, a light grid behind everything."""
    panel.grid(color=GRID, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Figure, panels: Sequence[Any], columns: int = 4) -> None:
    """One legend for all panels, each label once, in the order in which they first appear."""
    entries: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        entries.values(), entries, loc="outside lower center", ncols=min(columns, len(entries)), frameon=False
    )


def shades(num: int) -> list[Any]:
    """`num` colours for amounts, least to most."""
    from matplotlib import colormaps

    return [colormaps["cividis"](i / max(1, num - 1)) for i in range(num)]


@functools.cache
def _known_characters() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties(family="DejaVu Sans Mono"))).get_charmap())


def drawable(text: str) -> str:
    """`text` with a box for each character that the pictures' font lacks."""
    return "".join(c if ord(c) in _known_characters() and c.isprintable() else "▯" for c in text)


def shorten(text: str, length: int = 40) -> str:
    """At most `length` characters of what can be drawn."""
    text = drawable(text)
    return text if len(text) <= length else text[: length - 1] + "…"


# -- files


def png(figure: Figure) -> bytes:
    """The figure as PNG."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an `<svg>` element for a page: its ids begin with `name`, and its neutral colours are the page's.

    Args:
        label: what it shows, for those who cannot see it.
    """
    image = io.StringIO()
    figure.savefig(image, format="svg", metadata={"Date": None}, transparent=True)
    text = image.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", text)
    for colour, variable in CSS_COLOURS.items():
        text = text.replace(colour, variable)
    size = re.search(r'viewBox="[^"]*"', text)
    assert size is not None
    head = (
        f'<svg {size.group()} role="img" aria-label="{_attribute(label)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return re.sub(r"<svg[^>]*>", lambda _: head, text, count=1).strip()


def _attribute(text: str) -> str:
    import html

    return html.escape(text, quote=True)
