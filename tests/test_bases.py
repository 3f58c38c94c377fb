from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rheostat import bases
from rheostat.bases import base_facts
from rheostat.checkpoints import BUNDLED
from rheostat.conversion import STAMP


def loaded_from(place: object) -> Any:
    return SimpleNamespace(config=SimpleNamespace(_name_or_path=str(place)))


def test_every_bundled_model_is_known():
    assert {one.file for one in BUNDLED.values()} == set(bases.BUNDLED)
    assert STAMP == bases.STAMP


def test_a_converted_copy_is_what_it_was_converted_from(tmp_path: Path):
    (file,) = bases.BUNDLED
    (tmp_path / STAMP).write_text(json.dumps({"source": file}))
    assert base_facts(loaded_from(tmp_path))["hub_id"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    (tmp_path / STAMP).write_text(json.dumps({"source": "other.gguf"}))
    assert base_facts(loaded_from(tmp_path)) == {"name": "other"}


@pytest.mark.parametrize("stamp", ["{", "[]", '{"files": 1}'])
def test_a_damaged_stamp_is_none(tmp_path: Path, stamp: str):
    (tmp_path / STAMP).write_text(stamp)
    assert base_facts(loaded_from(tmp_path)) == {"name": tmp_path.name}


@pytest.mark.parametrize(
    ("place", "wanted"),
    [
        ("", {}),
        ("someone/model-1.5", {"name": "model-1.5", "hub_id": "someone/model-1.5"}),
        ("/not/there", {"name": "there"}),
        ("a/b/c", {"name": "c"}),
    ],
)
def test_places(place: str, wanted: dict[str, str]):
    assert base_facts(loaded_from(place)) == wanted


def test_a_model_made_in_memory_has_no_name():
    assert base_facts(SimpleNamespace(config=SimpleNamespace())) == {}


def test_a_folder_passes_on_what_its_card_says(tmp_path: Path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\n- fr\ntags: [x]\n---\n# A model\n")
    assert base_facts(loaded_from(tmp_path)) == {"name": tmp_path.name, "license": "mit", "language": ["en", "fr"]}


@pytest.mark.parametrize("text", ["# No metadata\n", "---\na: [\n---\n", "---\n- list\n---\n"])
def test_odd_cards_say_nothing(tmp_path: Path, text: str):
    (tmp_path / "README.md").write_text(text)
    assert base_facts(loaded_from(tmp_path)) == {"name": tmp_path.name}
