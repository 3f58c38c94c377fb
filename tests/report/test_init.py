from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest

from rheostat.errors import SettingError
from rheostat.report import file_digest, origin, write_whole


def test_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "new" / "file"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SettingError, match="it is full"):
        write_whole(path, b"three")
    assert path.read_bytes() == b"two"
    assert [one.name for one in path.parent.iterdir()] == ["file"]


def test_the_command_can_be_typed_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/__main__.py", "generate", "m", "two words"])
    assert origin(seed=1)["command"] == "rheostat generate m 'two words'"


def test_digest(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"")
    assert file_digest(tmp_path / "a").startswith("e3b0c44298fc1c14")
