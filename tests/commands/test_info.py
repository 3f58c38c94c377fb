from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rheostat import digests, models


def test_an_artifact_is_not_loaded(rheostat, dial_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models, "load", None)
    done = rheostat("info", dial_folder, "--json")
    assert done.status == 0, done.err
    manifest = json.loads((dial_folder / "rheostat.json").read_text())
    figures = done.figures
    assert figures["dial"] == manifest["dial"]
    assert figures["method"] == manifest["method"]
    assert figures["geometry"]["ffn_size"] == 64
    assert figures["provenance"]["base_digest"] == manifest["report"]["base_digest"]
    for wanted in (
        "2 layers, width 32, FFN 64",
        "tile=4",
        "dynamoe setting",
        "base digest",
        "model.safetensors",
        "checked  sizes and headers",
    ):
        assert wanted in done.out


def test_a_plain_model(rheostat, tiny_model_folder: Path):
    done = rheostat("info", tiny_model_folder, "--json")
    assert done.status == 0, done.err
    parts = done.figures["parameters"]
    assert parts["ffn"] == 2 * 3 * 32 * 64
    assert parts["head"] == 0  # tied
    assert sum(parts.values()) == 2 * parts["total"]
    assert done.figures["provenance"]["model_digest"]
    assert "dial     none" in done.out


def test_damaged_manifests(refused, dial_folder: Path, tmp_path: Path):
    folder = tmp_path / "dial"
    shutil.copytree(dial_folder, folder)
    manifest = json.loads((folder / "rheostat.json").read_text())
    geometry = manifest.pop("geometry")
    (folder / "rheostat.json").write_text(json.dumps(manifest))
    assert "lacks a geometry" in refused("info", folder)
    (folder / "rheostat.json").write_text(json.dumps(manifest | {"geometry": geometry | {"wings": 2}}))
    assert "lacks a geometry" in refused("info", folder)
    (folder / "rheostat.json").write_text("{")
    assert "cannot be read" in refused("info", folder)


@pytest.fixture
def damaged(dial_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(dial_folder, tmp_path / "dial"))


def overwrite(file: Path, place: int, content: bytes) -> None:
    """Other bytes; the size stays."""
    with file.open("r+b") as stream:
        stream.seek(place, 0 if place >= 0 else 2)
        stream.write(content)


@pytest.mark.parametrize("name", ["model.safetensors", "method.safetensors"])
def test_damage_that_a_glance_shows(refused, damaged: Path, name: str):
    file = damaged / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert f"{name} has {len(whole) - 1} bytes, must have {len(whole)}: it is damaged" in refused("info", damaged)
    file.write_bytes(whole)
    overwrite(file, 0, b"\xff" * 8)  # where the header's length stands
    assert f"{name} is damaged (" in refused("info", damaged)
    file.unlink()
    assert f"the file {name} is missing" in refused("info", damaged, "--json")


def test_a_missing_configuration(refused, damaged: Path):
    (damaged / "config.json").unlink()
    assert "the file config.json is missing" in refused("info", damaged)


def test_a_changed_byte_is_seen_by_reading_all(rheostat, refused, damaged: Path, monkeypatch: pytest.MonkeyPatch):
    def remembered() -> dict:
        raise AssertionError("digests that are remembered do not count here")

    monkeypatch.setattr(digests, "_remembered", remembered)
    done = rheostat("info", damaged, "--verify", "--json")
    assert (done.status, done.figures["verified"]) == (0, True)
    assert "checked  digests of all bytes" in done.out
    overwrite(damaged / "model.safetensors", -1, b"\x7f")
    assert rheostat("info", damaged).status == 0  # quick, and says that it has not read them
    assert "model.safetensors is not the file that was saved" in refused("info", damaged, "--verify")


def test_nothing_to_verify(rheostat, tiny_model_folder: Path):
    done = rheostat("info", tiny_model_folder, "--verify")
    assert done.status == 0
    assert "warning: verify: has no effect" in done.err
