"""Folders appear whole or not at all, and the reason why not names the folder."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from rheostat.errors import SettingError
from rheostat.folders import cache_folder, check_output, whole_folder

Usage = namedtuple("Usage", "total used free")


def fill(folder: Path, text: str = "new") -> None:
    (folder / "file").write_text(text)


@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_rights_that_the_umask_gives(tmp_path, umask, rights):
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "out") as folder:
            (folder / "deep").mkdir()
            for file in (folder / "model", folder / "deep" / "file"):
                file.touch(0o600)  # as safetensors writes
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").rglob("*") if file.is_file()} == {
        "model": rights,
        "file": rights,
    }


def old_folder(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    fill(path, "old")
    (path / "rheostat.json").write_text("{}")
    return path


def test_a_folder_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "deep" / "out"
    with whole_folder(path) as folder:
        fill(folder)
        assert not path.exists()
        assert folder.parent == path.parent  # on the same disk, so that it can be renamed
    assert (path / "file").read_text() == "new"
    assert os.listdir(path.parent) == ["out"]
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SettingError("x=1: must be 2")])
def test_nothing_is_left_after_an_error(tmp_path, error):
    path = tmp_path / "out"
    with pytest.raises(type(error)), whole_folder(path) as folder:
        fill(folder)
        raise error
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_stays_unless_overwritten(tmp_path):
    path = old_folder(tmp_path)
    with (
        pytest.raises(SettingError, match=r"out='.*out': must be a folder that does not exist yet"),
        whole_folder(path),
    ):
        raise AssertionError("the block must not run")
    with whole_folder(path, overwrite=True) as folder:
        fill(folder)
        assert (path / "file").read_text() == "old"
    assert (path / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_the_old_folder_survives_an_error(tmp_path):
    path = old_folder(tmp_path)
    with pytest.raises(RuntimeError), whole_folder(path, overwrite=True) as folder:
        fill(folder)
        raise RuntimeError
    assert (path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    path = old_folder(tmp_path)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if target == path and not self.name.endswith(".old"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(KeyboardInterrupt), whole_folder(path, overwrite=True) as folder:
        fill(folder)
    assert (path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_in_the_way_is_refused(tmp_path):
    path = tmp_path / "out"
    path.write_text("mine")
    with pytest.raises(SettingError, match=r"out=.*must be a folder, this is a file"):
        check_output(path, overwrite=True)
    with pytest.raises(SettingError, match=r"out=.*must be in a folder, and .*out is a file"):
        check_output(path / "a" / "b", overwrite=False)
    assert path.read_text() == "mine"


def test_a_parent_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    # The tests may run as root, who may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(SettingError, match=rf"out=.*in a folder that can be written; {tmp_path} cannot"):
        check_output(tmp_path / "a" / "b", overwrite=False)
    assert os.listdir(tmp_path) == []


def test_a_disk_too_full_is_refused_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 10**9))
    with pytest.raises(SettingError, match=r"on a disk with 2.0 GB free; .* has 1.0 GB"):
        check_output(tmp_path / "out", overwrite=False, needed_bytes=2 * 10**9)
    assert check_output(tmp_path / "out", overwrite=False, needed_bytes=10**9) == tmp_path / "out"


class SafetensorError(Exception):
    """How `safetensors` reports what the system said."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "on a disk with room left; it is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "on a disk with room left; it is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "on a disk with room left; it is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "in a folder that can be written"),
        (OSError(errno.EROFS, "Read-only file system"), "in a folder that can be written"),
    ],
)
def test_what_goes_wrong_while_writing_is_told_and_leaves_nothing(tmp_path, error, message):
    path = old_folder(tmp_path)
    with (
        pytest.raises(SettingError, match=rf"out='.*out': must be {message}"),
        whole_folder(path, overwrite=True) as folder,
    ):
        fill(folder)
        raise error
    assert os.listdir(tmp_path) == ["out"]
    assert (path / "file").read_text() == "old"


def test_other_errors_of_the_system_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), whole_folder(tmp_path / "out") as folder:
        (folder / "none").read_text()
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_ours_is_not_replaced(tmp_path):
    path = tmp_path / "letters"
    path.mkdir()
    check_output(path, overwrite=True)  # empty
    fill(path)
    with pytest.raises(SettingError, match="holds no config.json"), whole_folder(path, overwrite=True):
        raise AssertionError("not reached")
    assert (path / "file").read_text() == "new"
    check_output(path, overwrite=True, is_replaced=False)
    (path / "config.json").write_text("{}")
    check_output(path, overwrite=True)


@pytest.mark.parametrize("target", ["out", "nowhere"])
def test_a_link_stays_and_the_folder_that_it_names_is_made(tmp_path, target):
    old_folder(tmp_path)
    link = tmp_path / "links" / "link"
    link.parent.mkdir()
    link.symlink_to(tmp_path / target)
    with whole_folder(link, overwrite=True) as folder:
        fill(folder)
        assert folder.parent == tmp_path  # where it is renamed
    assert link.is_symlink()
    assert (tmp_path / target / "file").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == sorted({"links", "out", target})
    assert os.listdir(link.parent) == ["link"]


def test_a_name_that_no_folder_can_have_is_refused(tmp_path):
    with pytest.raises(SettingError, match=r"out='.*xxx': must be a folder that can be made \(File name too long\)"):
        check_output(tmp_path / ("x" * 300), overwrite=True)


def test_where_files_join_a_folder_it_is_the_one_that_must_be_writable(tmp_path, monkeypatch):
    path = old_folder(tmp_path)
    monkeypatch.setattr(os, "access", lambda found, mode: Path(found) != path)
    check_output(path, overwrite=True)  # replaced: what is written lies beside it
    with pytest.raises(SettingError, match=r"out='.*out': must be a folder that can be written"):
        check_output(path, overwrite=True, is_replaced=False)
    monkeypatch.setattr(os, "access", lambda found, mode: Path(found) == path)
    check_output(path, overwrite=True, is_replaced=False)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.delenv("RHEOSTAT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(SettingError, match=r"RHEOSTAT_CACHE=None: must be a folder that can be written: there is no"):
        cache_folder()
    monkeypatch.setenv("RHEOSTAT_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
