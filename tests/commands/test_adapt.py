from __future__ import annotations

import json
from pathlib import Path

import pytest

from rheostat import adaptation
from rheostat.commands import adapt
from rheostat.methods.dynamoe import DynaMoE


def test_what_it_reports_and_saves(rheostat, adapt_arguments, tmp_path: Path):
    done = rheostat(*adapt_arguments, "--out", tmp_path / "dial", "--json", "--seed", 3)
    assert done.status == 0, done.err
    figures = done.figures
    manifest = json.loads((tmp_path / "dial" / "rheostat.json").read_text())
    assert figures["dial"] == manifest["dial"]
    assert figures["compute_low"] == manifest["dial"]["compute"][-1] < 1
    assert figures["method"]["tile"] == 4
    assert figures["fit_tokens"] == 8 * 64
    assert set(figures["seconds"]) == {"fit", "train", "dial"}
    made = figures["provenance"]
    assert made["seed"] == 3
    assert made["base_digest"] == manifest["report"]["base_digest"]
    assert len(made["artifact_digest"]) == 64
    assert {"command", "rheostat", "commit", "hardware"} <= set(made)
    assert f"compute  {figures['compute_low']:.3f} to 1" in done.out
    assert "solving" in done.err
    assert "\x1b" not in done.out + done.err
    assert [path.name for path in tmp_path.iterdir()] == ["dial"]


def test_settings_from_a_file(rheostat, adapt_arguments, tmp_path: Path):
    verb, model, *_ = adapt_arguments
    text = adapt_arguments[3]
    file = tmp_path / "adapt.yaml"
    file.write_text(
        f"model: {model}\nout: {tmp_path / 'dial'}\ndata: {text}\nheld_out: [{text}]\n"
        "method: dynamoe\nsettings: {tile: 4, router_width: 8, router_steps: 5, ridge: 1e-2}\n"
        "fit: {windows: 4, length: 32, dial_windows: 2}\n"
    )
    done = rheostat(verb, "--config", file, "--set", "ridge=2e-2", "--json")
    assert done.status == 0, done.err
    assert done.figures["method"]["ridge"] == 2e-2


def test_an_interrupted_run_resumes(rheostat, adapt_arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = [*adapt_arguments, "--out", tmp_path / "dial"]

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(adaptation, "calibrate", interrupt)
        done = rheostat(*arguments)
    assert done.status == 130
    assert done.err.splitlines()[-1] == "rheostat: interrupted; run the same command again to resume"
    assert [path.name for path in tmp_path.iterdir()] == [".dial.partial"]

    monkeypatch.setattr(DynaMoE, "fit", interrupt)  # the fit was kept: it is not done again
    assert rheostat(*arguments).status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["dial"]


def test_overwrite(rheostat, refused, adapt_arguments, tmp_path: Path):
    out = tmp_path / "dial"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "out=" in refused(*adapt_arguments, "--out", out)
    assert (out / "mine.txt").read_text() == "mine"
    assert "holds no config.json" in refused(*adapt_arguments, "--out", out, "--overwrite")
    assert (out / "mine.txt").read_text() == "mine"
    (out / "rheostat.json").write_text("{}")
    assert rheostat(*adapt_arguments, "--out", out, "--overwrite").status == 0
    assert not (out / "mine.txt").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "magic"], "method='magic': must be one of dense, dynamoe"),
        (["--set", "experts=4"], "dynamoe.experts=4: must be one of the settings num_experts"),
        (["--set", "tile=0"], "dynamoe.tile=0: must be an integer of at least 1"),
        (["--set", "tile"], "set='tile': must be KEY=VALUE"),
        (["--fit", "windows=0"], "fit.windows=0: must be 1 or more"),
        (["--fit", "windoze=1"], "fit.windoze=1: must be one of the settings windows"),
        (["--fit", "windows=many"], "fit.windows='many': must be of type int"),
        (["--train", "low=2"], "train.low=2.0: must be above 0"),
        (["--data", "no_such_text"], "data='no_such_text': must be an existing file"),
        (["--data", "no_such_text,nor_this"], "data='no_such_text': must be an existing file"),
        (["--held-out", "none.txt"], "data='none.txt': must be an existing file"),
        (["--fit", "length=999999"], "must be enough text for one window of 999999 tokens"),
        (["--device", "abacus"], "device='abacus'"),
        (["--dtype", "int3"], "dtype='int3': must be one of float32"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["--sede", "1"], "unrecognized arguments: --sede"),
        (["--config", "none.yaml"], "config='none.yaml': cannot be read"),
    ],
)
def test_bad_settings(refused, adapt_arguments, tmp_path: Path, flags: list[str], message: str):
    assert message in refused(*adapt_arguments, "--out", tmp_path / "dial", *flags)
    assert not list(tmp_path.iterdir())


def test_what_must_be_given(refused, adapt_arguments, tmp_path: Path):
    assert "out: must be given (the folder to make)" in refused(*adapt_arguments)
    assert "model: must be given" in refused("adapt", "--out", tmp_path / "dial")
    (tmp_path / "c.yaml").write_text("methd: dynamoe")
    assert "methd='dynamoe': must be one of the settings" in refused("adapt", "--config", tmp_path / "c.yaml")


def test_output_that_cannot_be_written(refused, adapt_arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    assert "a folder, this is a file" in refused(*adapt_arguments, "--overwrite", "--out", tmp_path / "file")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "in a folder that can be written" in refused(*adapt_arguments, "--out", tmp_path / "dial")


def test_a_full_disk_is_seen_before_the_work(refused, adapt_arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adapt, "BYTES_PER_PARAMETER", 10**15)
    assert "on a disk with" in refused(*adapt_arguments, "--out", tmp_path / "dial")
    assert not list(tmp_path.iterdir())


def test_an_adapted_model_is_refused(refused, dial_folder, tmp_path: Path):
    assert "must be a dense model" in refused("adapt", dial_folder, "--out", tmp_path / "dial")


def test_help_lists_the_settings_of_methods(rheostat):
    done = rheostat("adapt", "--help")
    assert done.status == 0
    for wanted in (
        "num_experts=4",
        "slices of (e + 1) / E of the FFN",
        "dial_windows=12",
        "lora_rank=0",
        "example:",
    ):
        assert wanted in done.out
