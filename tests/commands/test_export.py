from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM


def test_a_plain_checkpoint(rheostat, dial_folder: Path, tmp_path: Path):
    out = tmp_path / "plain"
    done = rheostat("export", dial_folder, "--compute", "0.8", "--out", out, "--json")
    assert done.status == 0, done.err
    figures = done.figures
    model = AutoModelForCausalLM.from_pretrained(out)
    assert figures["ffn_size"] == model.config.intermediate_size < figures["dense_ffn_size"] == 64
    assert figures["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert figures["compute"] <= 0.8 + 1e-3
    assert figures["provenance"]["artifact_digest"]
    assert f"width       {figures['ffn_size']} of 64 FFN channels" in done.out
    assert "layers" in rheostat("info", out).out
    text = (out / "README.md").read_text()
    assert f"{figures['ffn_size']} of 64 FFN channels" in text
    assert ModelCard(text).data.library_name == "transformers"


def test_at_full_compute_it_is_the_dense_model(rheostat, dial_folder: Path, tmp_path: Path):
    done = rheostat("export", dial_folder, "--out", tmp_path / "plain", "--json")
    assert done.status == 0, done.err
    assert done.figures["compute"] == 1.0
    assert done.figures["ffn_size"] == 64


@pytest.mark.parametrize("compute", ["0", "nan", "1.5", "0.01"])
def test_bad_compute(refused, dial_folder: Path, tmp_path: Path, compute: str):
    message = refused("export", dial_folder, "--compute", compute, "--out", tmp_path / "plain")
    assert f"compute={float(compute)}: must be" in message
    assert not list(tmp_path.iterdir())


def test_bad_output(refused, dial_folder: Path, tmp_path: Path):
    (tmp_path / "plain").mkdir()
    assert "--overwrite" in refused("export", dial_folder, "--out", tmp_path / "plain")
    assert not list((tmp_path / "plain").iterdir())
    # Seen before any work: not even the model is looked for.
    assert "--overwrite" in refused("export", tmp_path / "none", "--out", tmp_path / "plain")
    assert "out: must be given" in refused("export", dial_folder)


def test_a_dense_model_has_one_setting(refused, tiny_model_folder: Path, tmp_path: Path):
    assert "compute=0.8: must be 1.0" in refused(
        "export", tiny_model_folder, "--compute", "0.8", "--out", tmp_path / "x"
    )
