"""The page in a real browser: type, turn the dial, write, compare. With RHEOSTAT_SHOTS=FOLDER it leaves pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from rheostat.report.schema import Report
from rheostat.serve.curves import curves
from tests.serve.chromium import BROWSER, Page, chromium
from tests.serve.conftest import Live, Tiny, live

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs Chromium")]

PROMPT = "rivers <b>run</b>"
RATIOS = {"dial": {0.9: 1.08, 0.8: 1.2, 0.7: 1.45}, "static": {0.9: 1.2, 0.8: 1.5, 0.7: 1.9}}
REPORT: Report = {
    "texts": [
        {
            "name": name,
            "runs": [
                {"kind": kind, "compute": compute, "ratio": ratio * harder}
                for kind, points in RATIOS.items()
                for compute, ratio in points.items()
            ],
        }
        for name, harder in (("novels", 1.0), ("facts", 1.5))
    ]
}  # type: ignore[typeddict-item]


@pytest.fixture(scope="module")
def server(tiny: Tiny) -> Iterator[Live]:
    with live(tiny, curves=curves(REPORT)) as one:
        yield one


@pytest.fixture
def page(server: Live, tmp_path: Path) -> Iterator[Page]:
    with chromium(tmp_path / "profile") as one:
        one.open(f"{server.base}/")
        one.look(1200, 900)
        yield one


def text_of(page: Page, name: str) -> str:
    return page.run(f"document.getElementById('dial-{name}').closest('section').querySelector('.answer').textContent")


def shoot(page: Page, name: str) -> None:
    if folder := os.environ.get("RHEOSTAT_SHOTS"):
        page.shoot(Path(folder) / f"{name}.png")


def test_two_settings_are_written_side_by_side(server: Live, page: Page, tiny: Tiny):
    page.run("document.getElementById('prompt').focus(); document.getElementById('prompt').select()")
    page.call("Input.insertText", text=PROMPT)
    page.run("document.getElementById('tokens').value = 24")
    page.run("document.getElementById('dial-b').focus()")
    for _ in range(5):
        page.key("ArrowLeft")  # the dial by keyboard
    low = round(page.run("Number(document.getElementById('dial-b').value)"), 2)
    assert low == pytest.approx(max(0.75, tiny.adapted.dial.low) - 0.05, abs=0.011)
    page.key("Enter", 2)
    page.until("document.body.dataset.state === 'done'")
    assert text_of(page, "a") == tiny.offline_chat(PROMPT, 1.0, 24)
    assert text_of(page, "b") == tiny.offline_chat(PROMPT, low, 24)
    assert text_of(page, "a") != text_of(page, "b")
    colours = "new Set([...document.querySelectorAll('.panel.{} .answer span')].map(s => s.style.background)).size"
    assert page.run(colours.replace("{}", "a")) == 1
    assert page.run(colours.replace("{}", "b")) > 1
    bills = page.run("[...document.querySelectorAll('.bill')].map(one => one.innerText)")
    assert "1.000 spent, 1.00 asked" in bills[0]
    assert f"{low:.2f} asked" in bills[1]
    sizes = page.run("[...document.querySelectorAll('canvas')].map(one => [one.width >= 24, one.height])")
    assert sizes == [[True, 3], [True, 3]]  # a row for each layer
    assert page.run("document.querySelectorAll('#plot path').length") == 2
    assert page.run("document.querySelectorAll('#plot circle[r=\"7\"]').length") == 2
    assert page.complaints == []
    shoot(page, "wide")
    page.look(1200, 900, dark=True)
    shoot(page, "dark")
    page.look(390, 844)
    assert page.run("document.documentElement.scrollWidth") <= 390
    shoot(page, "phone")


def test_all_controls_are_reached_by_keyboard_in_the_order_of_the_page(page: Page):
    page.run("document.getElementById('prompt').focus()")
    reached = []
    for _ in range(7):
        page.key("Tab")
        reached.append(page.run("document.activeElement.id"))
        assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid", reached[-1]
    assert reached == ["tokens", "temperature", "compare", "send", "dial-a", "dial-b", "text"]


def test_the_map_tells_width_and_the_curve_is_that_of_the_chosen_text(page: Page):
    page.run("document.getElementById('tokens').value = 8")
    page.key("Enter", 2)
    page.until("document.body.dataset.state === 'done'")
    page.run("document.querySelector('.panel.a canvas').scrollIntoView()")
    place = page.run("(({x, y}) => [x, y])(document.querySelector('.panel.a canvas').getBoundingClientRect())")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0] + 4, y=place[1] + 4)
    page.until("document.querySelector('.panel.a .at').textContent === '· layer 1, token 1: 100 %'")
    before = page.run("document.querySelector('#plot .curve').getAttribute('d')")
    page.run("document.getElementById('text').focus()")
    page.key("ArrowDown")
    page.until("document.getElementById('chartnote').textContent.startsWith('Perplexity on facts')")
    assert page.run("document.querySelector('#plot .curve').getAttribute('d')") != before
    assert page.complaints == []


def test_escape_stops_and_a_mistake_is_shown(server: Live, page: Page):
    page.run("document.getElementById('compare').click()")
    assert page.run("document.querySelectorAll('.panel:not([hidden])').length") == 1
    page.run("document.getElementById('tokens').value = 200")
    page.key("Enter", 2)
    page.until("document.querySelectorAll('.answer span').length > 2")
    page.key("Escape")
    page.until("document.body.dataset.state === 'done'")
    server.wait_idle()
    assert 2 < page.run("document.querySelectorAll('.answer span').length") < 200
    page.run("document.getElementById('tokens').value = 2000; delete document.body.dataset.state")
    page.key("Enter", 2)
    page.until("document.body.dataset.state === 'done'")
    assert "max_tokens=2000: must be at most" in page.run("document.querySelector('[role=alert]').textContent")


def test_the_page_needs_no_other_site(server: Live):
    answer = httpx.get(f"{server.base}/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in answer.text
