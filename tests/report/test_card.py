"""Cards that the Hub understands, written anew only as long as nobody has edited them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load

from rheostat.report import card
from tests.report.sample import NASTY, put, sample

BASE = {"name": "Tiny", "hub_id": "someone/Tiny", "license": "apache-2.0", "language": "en"}
FACTS = {"method": "some", "asked": 0.7, "compute": 0.69, "ffn_size": 48, "dense_ffn_size": 64, "provenance": None}


def manifest(**report: Any) -> dict[str, Any]:
    """Like that of an artifact."""
    return {
        "format_version": 1,
        "method": {"name": "some", "tile": 4},
        "dial": {"compute": [1.0, 0.7], "settings": {"some": [0.0, 0.1]}, "measured_on": {"tokens": 4096}},
        "report": {
            "provenance": {"command": "rheostat adapt tiny", "base_digest": "b"},
            "base": BASE,
            "fit": {"windows": 8, "length": 64},
            "held_out": "builtin:heldout",
        }
        | report,
        "files": {},
    }


def parsed(text: str) -> dict[str, Any]:
    """The metadata, as the Hub reads it."""
    return ModelCard(text).data.to_dict()


def test_metadata_of_an_artifact(tmp_path: Path):
    text = card.artifact_card(manifest(), name="dial")
    (tmp_path / "README.md").write_text(text)
    wanted = {
        "library_name": "rheostat",
        "pipeline_tag": "text-generation",
        "base_model": "someone/Tiny",
        "license": "apache-2.0",
        "language": "en",
        "tags": ["rheostat", "adaptive-compute", "dynamic-inference", "some"],
    }
    assert parsed(text) == metadata_load(tmp_path / "README.md") == wanted


@pytest.mark.parametrize(
    ("base", "missing"),
    [
        ({}, {"base_model", "license", "language"}),
        ({"name": "folder"}, {"base_model", "license", "language"}),
        ({"license": "see: [my] licence\nfile"}, {"license"}),
        ({"language": {"a": 1}}, {"language"}),
    ],
)
def test_what_is_not_known_is_not_claimed(base: dict[str, Any], missing: set[str]):
    text = card.artifact_card(manifest(base=base), name="dial")
    assert not missing & set(parsed(text))
    if "license" in missing:
        assert "licence of the base model is not known" in text


def test_what_an_unmeasured_artifact_says():
    text = card.artifact_card(manifest(), name="dial")
    assert "made from [someone/Tiny](https://huggingface.co/someone/Tiny)" in text
    assert 'rheostat.load("dial")' in text
    assert "max_new_tokens=64, compute=0.8)" in text
    assert "| 0.700 | 0.1 |" in text
    assert "It works from 0.700 to 1" in text
    assert "Not measured yet. `rheostat eval dial --out dial/report`" in text
    assert "not trained with gradients" in text
    assert "`tile=4`" in text
    assert "| command | `rheostat adapt tiny` |" in text
    assert "![" not in text


def test_a_model_without_a_dial_or_a_history():
    bare = {"method": {"name": "dense"}, "dial": {"compute": [1.0], "settings": {}}, "report": {}}
    text = card.artifact_card(bare, name=NASTY)
    assert "runs at compute 1 only" in text
    assert "max_new_tokens=64, compute=1)" in text
    assert "<script>" not in text.split("## How to load it")[0]
    assert parsed(text)["library_name"] == "rheostat"


def test_training_is_told():
    assert "trained with gradients on 2,000 tokens" in card.artifact_card(manifest(trained={"tokens": 2000}), name="d")


def test_measured_quality():
    text = card.artifact_card(manifest(), name="dial", report=sample(), folder="figures")
    assert "![Quality against FLOPs](figures/pareto.png)" in text
    assert "**1.050 ± 0.010**" in text
    assert "Measured by `rheostat eval models/dial`; everything is in [report.json](figures/report.json)." in text
    assert "Not measured" not in text
    assert "With 4 windows" in text


def test_an_export():
    text = card.export_card({**FACTS, "base": BASE}, name="plain")
    data = parsed(text)
    assert (data["library_name"], data["base_model"], data["tags"]) == (
        "transformers",
        "someone/Tiny",
        ["rheostat", "pruned"],
    )
    assert "48 of 64 FFN channels" in text
    assert "0.690 of the dense model's FLOPs" in text
    assert 'from_pretrained("plain")' in text
    assert "has not been measured" in text
    whole = card.export_card({**FACTS, "base": {}, "ffn_size": 64}, name="plain")
    assert "it is the dense model inside the adapted one" in whole
    assert parsed(whole)["tags"] == ["rheostat"]


def test_cards_tell_whether_they_were_edited():
    text = card.artifact_card(manifest(), name="dial")
    assert card.is_ours(text)
    assert not card.is_ours(text.replace("# dial", "# My dial"))
    assert not card.is_ours(text + "more\n")
    assert not card.is_ours("# Mine\n")
    assert text == card.artifact_card(manifest(), name="dial")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A folder with a manifest, a card and a report."""
    folder = tmp_path / "dial"
    folder.mkdir()
    (folder / "rheostat.json").write_text(json.dumps(manifest()))
    (folder / "README.md").write_text(card.artifact_card(manifest(), name="dial"))
    put(folder / "report", sample("words"))
    return folder


def test_refresh(artifact: Path):
    assert card.refresh(artifact, "report") == f"model card: {artifact / 'README.md'} now shows these figures"
    text = (artifact / "README.md").read_text()
    assert card.is_ours(text)
    assert "![Quality against FLOPs](report/pareto.png)" in text
    card.refresh(artifact, "report")
    assert (artifact / "README.md").read_text() == text


@pytest.mark.parametrize("content", [b"# Mine\n", b"\xff\xfe"])
def test_a_card_of_somebody_elses_is_left_alone(artifact: Path, content: bytes):
    (artifact / "README.md").write_bytes(content)
    line = card.refresh(artifact, "report")
    assert line is not None
    assert "left as it is" in line
    assert (artifact / "README.md").read_bytes() == content


def test_an_edited_card_is_left_alone(artifact: Path):
    edited = (artifact / "README.md").read_text().replace("## Limits", "## Limits, and a word of mine")
    (artifact / "README.md").write_text(edited)
    assert "has been edited" in (card.refresh(artifact, "report") or "")
    assert (artifact / "README.md").read_text() == edited


def test_a_card_that_was_removed_stays_away(artifact: Path):
    (artifact / "README.md").unlink()
    assert card.refresh(artifact, "report") is None
    assert not (artifact / "README.md").exists()
