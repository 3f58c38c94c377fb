"""A file that has not changed is not read again; one that has is."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from rheostat import digests
from rheostat.digests import known_digest


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The files that were read."""
    monkeypatch.setenv("RHEOSTAT_CACHE", str(tmp_path / "cache"))
    seen: list[Path] = []
    read = digests.read_digest
    monkeypatch.setattr(digests, "read_digest", lambda file: (seen.append(file), read(file))[1])
    return seen


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let some time pass."""
    later = time.time() + 10
    monkeypatch.setattr(time, "time", lambda: later)


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_settled_file_is_read_once(tmp_path, reads, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    settle(monkeypatch)
    assert [known_digest(file) for _ in range(3)] == [sha(b"abc")] * 3
    assert len(reads) == 1


def test_a_changed_file_is_read_again(tmp_path, reads, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    settle(monkeypatch)
    known_digest(file)
    before = file.stat()
    file.write_bytes(b"abd")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as much alike as a program can make it
    assert known_digest(file) == sha(b"abd")
    other = tmp_path / "other"
    other.write_bytes(b"xyz")
    other.replace(file)
    assert known_digest(file) == sha(b"xyz")
    assert len(reads) == 3


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, reads):
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    known_digest(file)
    known_digest(file)
    assert len(reads) == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}'])
def test_a_damaged_memory_costs_a_reading(tmp_path, reads, monkeypatch, content):
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / digests.FILE).write_text(content)
    settle(monkeypatch)
    assert known_digest(file) == known_digest(file) == sha(b"abc")
    assert len(reads) == 1


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, reads, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    monkeypatch.setenv("RHEOSTAT_CACHE", str(file / "no folder"))
    settle(monkeypatch)
    assert known_digest(file) == known_digest(file) == sha(b"abc")
    assert len(reads) == 2


def test_the_oldest_are_forgotten(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(digests, "MOST", 2)
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_bytes(file.name.encode())
    settle(monkeypatch)
    for file in (*files, files[2], files[1], files[0]):
        known_digest(file)
    assert [file.name for file in reads] == ["a", "b", "c", "a"]
