"""Which pictures a report has: their names, captions and what draws them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rheostat.report import curves, usage
from rheostat.report.notes import method_name
from rheostat.report.schema import Report, Text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[], "Figure"]

BARS = (
    "Bars are one standard error, paired with dense. The broad band joins the settings that none of the same cost (to "
    "1 %) or less beats."
)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture and what draws it. Draw inside `style.drawing()`."""

    name: str
    """Of its file, without the ending."""
    title: str
    caption: str
    whole: Draw
    """All of it, for a file."""
    panels: Sequence[tuple[str, Draw]]
    """What each part shows, and the part alone, for a page on which parts can wrap."""


def pictures(report: Report) -> list[Picture]:
    """Those that this report has the figures for, in the order in which they are to be read."""
    return [*_quality(report), *_times(report), *_tasks(report), *_use(report)]


def _by_text(
    name: str, title: str, caption: str, draw: Callable[[Sequence[Text]], Figure], texts: Sequence[Text]
) -> list[Picture]:
    """A picture with a part for each text; none where there are no texts."""
    if not texts:
        return []
    panels = [(text["name"], partial(draw, [text])) for text in texts]
    return [Picture(name=name, title=title, caption=caption, whole=partial(draw, texts), panels=panels)]


def _quality(report: Report) -> list[Picture]:
    texts, method = report["texts"], method_name(report)
    counted = [text for text in texts if all(run.get("bytes_per_token") for run in text["runs"])]
    return [
        *_by_text(
            "pareto",
            "Quality against FLOPs",
            f"Perplexity as a ratio to dense against FLOPs spent. {BARS}",
            partial(curves.against, method=method, axis=curves.FLOPS),
            texts,
        ),
        *_by_text(
            "bytes",
            "Quality against bytes",
            f"The same against the bytes that decoding one token in a batch of one moves. {BARS}",
            partial(curves.against, method=method, axis=curves.BYTES),
            counted,
        ),
    ]


NAMES = {"tpot_ms": ("milliseconds", "each decoded token"), "ttft_ms": ("first_token", "the first token")}
"""Key of a time -> the picture's name, and what took the time."""


def _times(report: Report) -> list[Picture]:
    found = []
    for key in curves.clocks(report):
        timed = [text for text in report["texts"] if curves.timed(report.get("bench", []), text["runs"], key)]
        name, what = NAMES[key]
        found += _by_text(
            name,
            f"Quality against milliseconds for {what}",
            "Measured medians; horizontal bars are quartiles, vertical ones one standard error.",
            partial(_clock, report, key),
            timed,
        )
    return found


def _clock(report: Report, key: str, texts: Sequence[Text]) -> Figure:
    return curves.against_milliseconds(report, texts, key)


def _tasks(report: Report) -> list[Picture]:
    tasks = report.get("tasks", [])
    names = curves.task_names(tasks)
    if not names:
        return []
    return [
        Picture(
            name="tasks",
            title="Scores on tasks",
            caption="Scores at each setting of the dial; bars are one standard error over questions.",
            whole=partial(curves.against_tasks, tasks, names),
            panels=[(name, partial(curves.against_tasks, tasks, [name])) for name in names],
        )
    ]


def _use(report: Report) -> list[Picture]:
    texts = [text for text in report["texts"] if text.get("use")]
    placed = [text for text in texts if all("positions" in use for use in text["use"])]
    spoken = [text for text in report["texts"] if text.get("passage", {}).get("rows")]
    return [
        *_by_setting(
            "experts",
            "Experts by layer",
            "Share of the tokens that took each expert, by layer. Lighter is wider, and dearer.",
            usage.by_layer,
            texts,
        ),
        *_by_setting(
            "positions",
            "FFN width by layer and position",
            "Mean FFN width by layer and by place in the window.",
            usage.by_position,
            placed,
        ),
        *_by_text(
            "tokens",
            "The price of each token",
            "The beginning of the first window; each token on the shade of its mean FFN width.",
            lambda texts: usage.by_token(texts[0]["passage"], texts[0]["name"]),
            spoken[:1],
        ),
    ]


def _by_setting(
    name: str, title: str, caption: str, draw: Callable[[Sequence[Text]], Figure], texts: Sequence[Text]
) -> list[Picture]:
    """A picture with a part for each setting of each text; none where there are no texts."""
    if not texts:
        return []
    alone: list[Text] = [{**text, "use": [use]} for text in texts for use in text["use"]]
    panels = [(f"{text['name']} at {text['use'][0]['asked']:g}", partial(draw, [text])) for text in alone]
    return [Picture(name=name, title=title, caption=caption, whole=partial(draw, texts), panels=panels)]
