"""What `report.json` may hold."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rheostat.errors import SettingError
from rheostat.report import schema, to_json
from rheostat.report.schema import FORMAT, check, read
from tests.report.sample import old_sample, sample

DOCS = Path(__file__).parents[2] / "docs"


def test_round_trip(tmp_path: Path):
    path = tmp_path / "report.json"
    path.write_text(to_json(sample(), indent=2))
    assert read(path) == sample()


def test_a_report_without_a_format_is_read_as_format_0():
    found = check(old_sample())
    assert found["format"] == 0
    assert found["texts"] == old_sample()["texts"]


def test_the_report_in_the_documentation_is_read():
    found = [read(path) for path in sorted((DOCS / "figures").glob("closed-*.json"))]
    assert found
    assert all(one["texts"] for one in found)


def test_keys_that_are_not_known_are_no_error():
    report = sample() | {"novelty": 1}
    report["texts"][0]["runs"][0]["novelty"] = 1
    assert check(report)["texts"][0]["runs"][0]["novelty"] == 1  # type: ignore[typeddict-item]


def spoil(*path: Any) -> Callable[[Any], None]:
    """Put the last of `path` at the place the others lead to; `del` takes the key away."""

    def change(report: Any) -> None:
        *where, key, value = path
        for step in where:
            report = report[step]
        if value is del_:
            del report[key]
        else:
            report[key] = value

    return change


del_ = object()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil("format", FORMAT + 1), f"format={FORMAT + 1}: must be at most {FORMAT}: upgrade rheostat to read it"),
        (spoil("format", "1"), f"format='1': must be an integer from 0 to {FORMAT}"),
        (spoil("format", True), "format=True: must be an integer from 0"),
        (spoil("texts", del_), "texts=None: must be given"),
        (spoil("texts", {}), "texts={}: must be a list"),
        (spoil("model", 3), "model=3: must be text"),
        (spoil("method", {}), "method.name=None: must be text"),
        (spoil("seed", 1.5), "seed=1.5: must be an integer"),
        (spoil("texts", 1, "runs", 2, "compute", "x"), "texts[1].runs[2].compute='x': must be a number"),
        (spoil("texts", 0, "runs", 0, "compute", None), "texts[0].runs[0].compute=None: must be a number"),
        (spoil("texts", 0, "runs", 0, "accuracy", float("nan")), "texts[0].runs[0].accuracy=nan: must be a number"),
        (spoil("texts", 0, "runs", 0, "ratio", 0.0), "texts[0].runs[0].ratio=0.0: must be above 0"),
        (spoil("texts", 0, "runs", []), "texts[0].runs=[]: must be a list that begins with the dense model's run"),
        (spoil("texts", 0, "runs", 0, "kind", "dial"), "must be a list that begins with the dense"),
        (spoil("texts", 0, "use", 0, "shares", 1, [1.0]), "texts[0].use[0].shares[1]=[1.0]: must be a list of 2"),
        (spoil("texts", 0, "passage", "tokens", ["a"]), "texts[0].passage.rows.widths[0]="),
        (spoil("texts", 0, "use", 0, "shares", []), "texts[0].use[0].shares=[]: must be about at least one layer"),
        (spoil("texts", 0, "use", 0, "positions", "width", [[1.0] * 3]), "must be about the same layers as shares"),
        (spoil("texts", 0, "passage", "tokens", []), "texts[0].passage.tokens=[]: must be a list of at least one"),
        (spoil("bench", 1, "ttft_ms", {"median": 1.0}), "bench[1].ttft_ms.low=None: must be given"),
        (spoil("bench", 1, "ttft_ms", "fast"), "bench[1].ttft_ms='fast': must be a number"),
        (spoil("tasks", 0, "rows", 1.5), "tasks[0].rows=1.5: must be an integer"),
        (spoil("tasks", 0, []), "tasks[0]=[]: must be an object"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_place(change: Callable[[Any], None], message: str):
    report = sample()
    change(report)
    with pytest.raises(SettingError) as caught:
        check(report, "some.json")
    line = str(caught.value)
    assert line.startswith("report='some.json': ")
    assert message in line
    assert "\n" not in line
    assert len(line) < 250


def test_nothing_measured_is_no_report():
    empty = sample() | {"texts": []}
    assert check(empty)["tasks"]
    with pytest.raises(SettingError, match="at least one text"):
        check(empty | {"tasks": [], "bench": []})


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"[]", "must be an object"), (b"{", "not valid JSON"), (b"\xff", "not valid JSON"), (None, "cannot be read")],
)
def test_files_that_are_no_reports(content: bytes | None, message: str, tmp_path: Path):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingError, match=message):
        read(path)


def test_a_figure_that_json_cannot_hold_stays_readable():
    report = sample()
    report["texts"][0]["runs"][1]["perplexity"] = float("inf")
    assert check(json.loads(to_json(report)))["texts"][0]["runs"][1]["perplexity"] is None


def test_every_key_is_documented():
    text = (DOCS / "report.md").read_text()
    kinds = [one for one in vars(schema).values() if typing.is_typeddict(one)]
    assert len(kinds) == 11
    missing = [f"{kind.__name__}.{key}" for kind in kinds for key in kind.__annotations__ if f"`{key}`" not in text]
    assert not missing
