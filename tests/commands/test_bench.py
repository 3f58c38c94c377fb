from __future__ import annotations

import json
from pathlib import Path

import pytest

from rheostat.bench import roof as roof_module
from rheostat.bench.roof import Sizes

SMALL = ("--prompts", "16,24", "--batch", "1,2", "--new", "3", "--rounds", "2")
ALONE = ("--no-memory", "--no-llama")


@pytest.fixture(autouse=True)
def crumbs(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A roof measured on next to nothing, kept in a folder of the test's own."""
    monkeypatch.setattr(roof_module, "CPU", Sizes(block_bytes=1 << 16, width=64, smallest=32, largest=64, repeats=1))
    cache = tmp_path_factory.mktemp("cache")  # not by RHEOSTAT_CACHE: native code would be compiled anew
    monkeypatch.setattr(roof_module, "cache_folder", lambda: cache)


def test_tables_and_figures(rheostat, dial_folder: Path, tiny_text: Path, tmp_path: Path):
    out = tmp_path / "figures"
    done = rheostat(
        "bench", dial_folder, "--compute", "1.0,0.8", *SMALL, *ALONE, "--data", tiny_text, "--out", out, "--json"
    )
    assert done.status == 0, done.err
    figures = done.figures
    stock = {f"stock {dtype}" for dtype in ("float32", "bfloat16", "float16")}
    cells = {(row["prompt"], row["batch"]) for row in figures["rows"]}
    assert cells == {(16, 1), (24, 1), (16, 2)}
    for cell in cells:
        rows = [row for row in figures["rows"] if (row["prompt"], row["batch"]) == cell]
        assert {row["side"] for row in rows[:3]} == stock
        native = [f"native {format} {compute}" for format in ("bf16", "int8") for compute in (1, 0.8)]
        assert [row["side"] for row in rows[3:]] == ["dial 1", "dial 0.8", *native]
        full, low = rows[3:5]
        assert full["compute"] == 1.0
        assert low["compute"] < 1
        assert low["token"]["flops"] < full["token"]["flops"]
        for row in rows:
            for phase in ("first_token", "token"):
                one = row[phase]
                assert len(one["rounds"]) == 2
                assert one["seconds"]["low"] <= one["seconds"]["median"] <= one["seconds"]["high"]
                assert one["of_bandwidth"] == pytest.approx(one["bytes_per_second"] / figures["roof"]["bandwidth"])
                assert one["against"] in stock
    assert figures["settings"]["prompts"] == [16, 24]
    assert figures["memory"] == []
    provenance = figures["provenance"]
    assert provenance["artifact_digest"]
    assert provenance["command"].startswith("rheostat ")
    assert json.loads((out / "bench.json").read_text()) == figures
    assert [path.name for path in out.iterdir()] == ["bench.json"]
    assert "time to first token, batch 1" in done.out
    assert "time per output token, batch 1" in done.out
    assert "tokens/s against batch, prompt 16" in done.out
    assert "prompt 16, batch 2: done" in done.err


@pytest.mark.usefixtures("unpainted")
def test_times_join_the_report_of_the_same_model(rheostat, dial_folder, tiny_text, tmp_path, monkeypatch):
    measured = ("eval", dial_folder, "--compute", "0.9", "--data", tiny_text, "--windows", 2, "--length", 64)
    assert rheostat(*measured, "--out", tmp_path).status == 0
    quick = ("bench", dial_folder, "--compute", "0.9", "--prompts", 16, "--new", 2, "--rounds", 1, "--data", tiny_text)
    done = rheostat(*quick, "--no-memory", "--no-llama", "--out", tmp_path)
    assert done.status == 0, done.err
    assert "the times are now part of the report" in done.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["compute"] for row in report["bench"] if row["side"] == "dial"] == [0.9]
    assert report["texts"]
    assert report["bench_provenance"]["command"].startswith("rheostat bench ")
    assert "first token, ms" in (tmp_path / "report.md").read_text()
    again = rheostat(*measured, "--out", tmp_path)  # a new evaluation keeps them
    assert again.status == 0
    assert json.loads((tmp_path / "report.json").read_text())["bench"] == report["bench"]


@pytest.mark.slow
@pytest.mark.usefixtures("unpainted")
def test_drafts_in_tables_figures_and_report(rheostat, dial_folder, tiny_text, tmp_path):
    measured = ("eval", dial_folder, "--compute", "1.0", "--data", tiny_text, "--windows", 2, "--length", 64)
    assert rheostat(*measured, "--out", tmp_path).status == 0
    quick = ("bench", dial_folder, "--compute", "1.0", "--prompts", 16, "--batch", "1", "--new", 8, "--rounds", 1)
    drafts = ("--weights", "fp32", "--draft", "low_dial,prompt_lookup", "--draft-length", 3, "--data", tiny_text)
    done = rheostat(*quick, *ALONE, *drafts, "--out", tmp_path, "--json")
    assert done.status == 0, done.err
    rows = {row["side"]: row["drafts"] for row in done.figures["rows"]}
    assert rows["native fp32 1"] is None
    assert rows["native fp32 low_dial 1"]["rounds"] >= 1
    assert "tokens a round" in done.out
    assert "native fp32 prompt_lookup 1" in done.out
    kept = {row["side"]: row.get("drafts") for row in json.loads((tmp_path / "report.json").read_text())["bench"]}
    assert kept["native fp32 low_dial"]["bytes_per_token"] > 0
    assert kept["native fp32"] is None
    assert "bytes a token" in (tmp_path / "report.md").read_text()


@pytest.mark.slow  # a process for each side
def test_memory_of_each_side_and_a_dense_model(rheostat, tiny_model_folder: Path):
    small = ("--prompts", "16", "--batch", "1", "--new", "2", "--rounds", "1", "--stock", "fp32", "--compute", "1.0")
    done = rheostat("bench", tiny_model_folder, *small, "--weights", "int8", "--json")
    assert done.status == 0, done.err
    assert [row["side"] for row in done.figures["memory"]] == ["stock float32", "dial 1", "native int8 1"]
    for row in done.figures["memory"]:
        assert row["peak_bytes"] >= row["loaded_bytes"] > 50e6
    assert "memory, prompt 16, batch 1" in done.out
    assert "against batch" not in done.out


def test_the_default_dial_goes_as_far_as_it_reaches(rheostat, tiny_model_folder: Path):
    done = rheostat("bench", tiny_model_folder, *SMALL, *ALONE, "--stock", "", "--weights", "", "--json")
    assert {row["side"] for row in done.figures["rows"]} == {"dial 1"}
    assert done.figures["rows"][0]["token"]["speedup"] is None


def test_the_machine_alone(rheostat):
    done = rheostat("bench", "--roof", "--json")
    assert done.status == 0, done.err
    roof = done.figures["roof"]
    assert set(roof["rows"]) >= {"float32", "bfloat16", "float16"}
    assert done.figures["provenance"]["hardware"]["processor"]
    assert "plain reading" in done.out
    again = rheostat("bench", "--roof", "--json")
    assert again.figures["roof"] == roof
    assert again.err == ""  # nothing was measured
    fresh = rheostat("bench", "--roof", "--refresh", "--json")
    assert "measuring the machine: done" in fresh.err


def test_llama_joins_in_where_it_is_installed(rheostat, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    from rheostat.bench import llama

    small = (*SMALL, "--no-memory", "--stock", "float32", "--json")
    monkeypatch.setattr(llama, "is_installed", lambda: False)
    notes = rheostat("bench", tiny_model_folder, *small).figures["notes"]
    assert notes == ["llama.cpp: not measured, it is not installed (pip install 'rheostat[llama]')"]
    monkeypatch.setattr(llama, "is_installed", lambda: True)
    notes = rheostat("bench", tiny_model_folder, *small).figures["notes"]
    assert notes == ["llama.cpp: not measured, no GGUF file of this model is known (--gguf names one)"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compute", "0.01"], "compute=0.01: must be between"),
        (["--compute", "1.5"], "compute=1.5: must be between"),
        (["--prompts", "0"], "prompts='0': must be numbers of 1 or more"),
        (["--prompts", ""], "prompts='': must be numbers of 1 or more"),
        (["--prompts", "300"], "prompts=300: must be at most 253: this model reads 256 tokens"),
        (["--batch", "2,0"], "batch='2,0': must be numbers of 1 or more"),
        (["--new", "1"], "new=1: must be 2 or more"),
        (["--rounds", "0"], "rounds=0: must be 1 or more"),
        (["--threads", "-1"], "threads=-1: must be 0 or more"),
        (["--dtype", "float8"], "dtype='float8': must be one of float32"),
        (["--weights", "int3"], "weights='int3': must be one of auto, fp32"),
        (["--stock", "float32,int3"], "stock='int3': must be one of float32"),
        (["--draft", "nobody"], "speculate='nobody': must be one of self"),
        (["--draft", "snapkv"], "draft='snapkv': must be one that our own runtime can run"),
        (["--draft", "self"], "speculate='self': must be another drafter"),
        (["--draft", "low_dial", "--draft-length", "0"], "draft_length=0: must be an integer from 1 to 64, or auto"),
        (["--draft", "low_dial", "--weights", ""], "draft='low_dial': must be left out where --weights is empty"),
        (["--device", "abacus"], "device='abacus': must be a device of this machine"),
        (["--data", "none"], "data='none': must be an existing file"),
        (["--batch", "9999"], "enough text for 9999 prompts of 24 tokens"),
    ],
)
def test_bad_settings(refused, dial_folder: Path, tiny_text: Path, tmp_path: Path, flags: list[str], message: str):
    common = ("bench", dial_folder, "--data", tiny_text, *SMALL, *ALONE, "--out", tmp_path / "figures")
    assert message in refused(*common, *flags)
    assert not list(tmp_path.iterdir())


def test_a_gguf_file_that_cannot_be_used(refused, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    from rheostat.bench import llama

    monkeypatch.setattr(llama, "is_installed", lambda: False)
    assert "pip install 'rheostat[llama]'" in refused("bench", tiny_model_folder, *SMALL, "--gguf", "m.gguf")
    monkeypatch.setattr(llama, "is_installed", lambda: True)
    assert "gguf='m.gguf': must be a file" in refused("bench", tiny_model_folder, *SMALL, "--gguf", "m.gguf")


def test_a_model_or_the_machine(refused):
    assert "model: must be given (or --roof, for the machine alone)" in refused("bench")


def test_an_interrupt_leaves_nothing_behind(rheostat, dial_folder: Path, tmp_path: Path, monkeypatch):
    from rheostat.bench import measuring

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "take_turns", lambda *_, **__: interrupted())
    done = rheostat("bench", dial_folder, *SMALL, *ALONE, "--out", tmp_path / "figures")
    assert done.status == 130
    assert not list(tmp_path.iterdir())
