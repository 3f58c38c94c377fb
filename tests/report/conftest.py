"""One report as it is written, with its page and all its pictures: drawing them takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from rheostat.report.writing import write
from tests.report.sample import sample


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The files of `sample()`. Tests must not change them."""
    return write(tmp_path_factory.mktemp("report") / "one", sample())
