"""Where the compute goes: experts by layer, widths by place in the text, and the price of each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rheostat.report.schema import Passage, Text, Use
from rheostat.report.style import INK, QUIET, drawable, grid, legend_below, new_figure, shades, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 10.4, 2.7
"""Inches of a row of panels."""
MAX_COLUMNS = 3
CHARACTERS = 100
"""In a line of a passage."""
LINE_INCHES = 0.27
MAX_LINES = 12
LIGHT_INK = "#fefefe"


def uses(texts: Sequence[Text]) -> list[tuple[str, Use]]:
    """(title, use) of each panel: every text at every setting of the dial."""
    return [(f"{text['name']}, compute {use['asked']:g}", use) for text in texts for use in text.get("use", [])]


def _panels(shown: Sequence[tuple[str, Use]], texts: Sequence[Text], extra: float = 0.0) -> tuple[Figure, Any, int]:
    """A figure with a panel for each use, its panels, and how many stand side by side (a row for a text)."""
    columns = min(MAX_COLUMNS, max(len(text.get("use", [])) for text in texts))
    figure, panels = grid(len(shown), (WIDTH / max(2, columns), HEIGHT), columns, extra)
    return figure, panels, columns


def by_layer(texts: Sequence[Text]) -> Figure:
    """Shares of the tokens that took each expert, stacked, for every layer."""
    shown = uses(texts)
    figure, panels, columns = _panels(shown, texts, extra=0.4)
    for i, (panel, (title, use)) in enumerate(zip(panels, shown, strict=True)):
        num_layers = len(use["shares"])
        edges = [layer - 0.5 for layer in range(num_layers + 1)]
        below = [0.0] * (num_layers + 1)
        for expert, (width, colour) in enumerate(zip(use["widths"], shades(len(use["widths"])), strict=True)):
            heights = [shares[expert] for shares in use["shares"]]
            heights.append(heights[-1])  # `step` wants a value for the last edge too
            above = [a + b for a, b in zip(below, heights, strict=True)]
            style = {"facecolor": colour, "edgecolor": QUIET, "linewidth": 0.5}
            panel.fill_between(edges, below, above, step="post", label=f"{width:.0%} of the FFN", **style)
            below = above
        panel.set_title(shorten(title, 50))
        panel.set_xlim(edges[0], edges[-1])
        panel.set_ylim(0, 1)
        _layer_ticks(panel.xaxis, num_layers)
        panel.yaxis.set_major_formatter(_percent())
        panel.set_xlabel("layer")
        if i % columns == 0:
            panel.set_ylabel("share of tokens")
        panel.spines[["top", "right"]].set_visible(False)
    legend_below(figure, panels[:1], columns=4 if len(panels) > 1 else 2)
    return figure


def by_position(texts: Sequence[Text]) -> Figure:
    """Mean FFN width for every layer and place in the window."""
    shown = [(title, use) for title, use in uses(texts) if "positions" in use]
    figure, panels, columns = _panels(shown, texts)
    low = min(use["widths"][0] for _, use in shown)
    image: Any = None
    for i, (panel, (title, use)) in enumerate(zip(panels, shown, strict=True)):
        places = use["positions"]
        starts = places["starts"]
        step = starts[1] - starts[0] if len(starts) > 1 else 1
        layers = len(places["width"])
        image = panel.imshow(
            [[float("nan") if cell is None else cell for cell in row] for row in places["width"]],
            cmap="cividis",
            vmin=low,
            vmax=1,
            aspect="auto",
            origin="lower",
            interpolation="none",
            extent=(starts[0], starts[-1] + step, -0.5, layers - 0.5),
        )
        panel.set_title(shorten(title, 50))
        _layer_ticks(panel.yaxis, layers)
        panel.set_xlabel("position (tokens)")
        if i % columns == 0:
            panel.set_ylabel("layer")
    bar = figure.colorbar(image, ax=panels, label="mean FFN width", format=_percent(), fraction=0.03, pad=0.02)
    bar.outline.set_visible(False)
    return figure


def by_token(passage: Passage, title: str) -> Figure:
    """The passage, each token on the shade of its mean FFN width, at the middle one of its settings."""
    row = middle_row(passage)
    lines = wrap(passage["tokens"], CHARACTERS)[:MAX_LINES]
    low = min(row["widths"])
    figure = new_figure(9.2, LINE_INCHES * len(lines) + 1.0)
    panel = figure.subplots()
    panel.set_xlim(0, CHARACTERS)
    panel.set_ylim(len(lines), 0)
    panel.set_axis_off()
    panel.set_title(shorten(f"{title}: the price of each token at compute {row['asked']:g}", 80), loc="left")
    colours = _map(low)
    for y, line in enumerate(lines):
        for x, index, piece in line:
            fill = colours.to_rgba(row["widths"][index])
            panel.broken_barh([(x, len(piece))], (y + 0.06, 0.88), facecolors=[fill], edgecolors="none")
            ink = _ink(fill)
            for k, character in enumerate(piece):  # one by one: cells of a fixed width, whatever the font's
                panel.text(x + k + 0.5, y + 0.52, character, color=ink, ha="center", va="center", **_MONO)
    bar = figure.colorbar(colours, ax=panel, orientation="horizontal", format=_percent(), aspect=60, pad=0.03)
    bar.set_label("mean FFN width over layers")
    bar.outline.set_visible(False)
    return figure


_MONO: dict[str, Any] = {"family": "DejaVu Sans Mono", "fontsize": 10}


def middle_row(passage: Passage) -> Any:
    """The row in the middle of the passage's settings."""
    rows = sorted(passage["rows"], key=lambda row: row["asked"])
    return rows[len(rows) // 2]


def wrap(tokens: Sequence[str], width: int) -> list[list[tuple[int, int, str]]]:
    """Tokens laid out in lines of at most `width` characters: (column, token's number, text) of each piece."""
    lines: list[list[tuple[int, int, str]]] = [[]]
    x = 0
    for index, token in enumerate(tokens):
        for part, piece in enumerate(token.split("\n")):
            if part:
                lines.append([])
                x = 0
            shown = drawable(piece.replace("\t", " "))
            if part < token.count("\n"):
                shown += "↵"
            while shown:
                if x and x + len(shown) > width:
                    lines.append([])
                    x = 0
                now, shown = shown[:width], shown[width:]
                lines[-1].append((x, index, now))
                x += len(now)
    return [line for line in lines if line]


def colour_of(width: float, low: float) -> tuple[str, str]:
    """Ground and ink, as `#rrggbb`, of a token whose mean FFN width is `width`, where `low` is the least."""
    from matplotlib.colors import to_hex

    fill = _map(low).to_rgba(width)
    return to_hex(fill), _ink(fill)


def _ink(fill: Sequence[float]) -> str:
    """Black or white, whichever reads better on `fill`."""
    return INK if _luminance(fill) > 0.18 else LIGHT_INK


def _map(low: float) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(low if low < 1 else 0.0, 1), "cividis")


def _luminance(colour: Sequence[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(xmax=1, decimals=0)


def _layer_ticks(axis: Any, num_layers: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(min(7, num_layers), integer=True))
