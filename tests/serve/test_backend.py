"""Which backend a model gets."""

from __future__ import annotations

import pytest

from rheostat.errors import SettingError
from rheostat.runtime.building import Unsupported
from rheostat.serve.backend import make_backend
from rheostat.serve.native import NativeBackend
from rheostat.serve.stock import StockBackend
from tests.serve.conftest import Tiny


def test_the_fastest_that_can_run_it_leaves_no_row_behind(tiny: Tiny):
    found = make_backend(tiny.adapted)
    assert isinstance(found, NativeBackend)
    assert found.cache.lengths.tolist() == []
    assert isinstance(make_backend(tiny.adapted, "stock"), StockBackend)


def test_where_a_prompts_cache_cannot_be_gone_on_from(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    def join(self: NativeBackend, joins: object) -> None:
        raise Unsupported("a cache of another kind")

    monkeypatch.setattr(NativeBackend, "join", join)
    assert isinstance(make_backend(tiny.adapted), StockBackend)
    with pytest.raises(SettingError, match="runtime=native.*a cache of another kind"):
        make_backend(tiny.adapted, "native")


def test_a_slower_one_that_nobody_asked_for_is_said(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("RHEOSTAT_KERNELS", "plain")
    assert isinstance(make_backend(tiny.adapted, "stock"), StockBackend)
    assert not caplog.records
    assert isinstance(make_backend(tiny.adapted), StockBackend)
    assert [one.levelname for one in caplog.records] == ["WARNING"]
    assert "row after row" in caplog.text
