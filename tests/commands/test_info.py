from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rheostat import models


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
