from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rheostat.commands.eval import names
from rheostat.report import card
from rheostat.report.schema import FORMAT, read
from tests.eval.conftest import pack_rows

SMALL = ("--windows", "4", "--length", "48")


def test_table_report_and_picture(rheostat, dial_folder: Path, tiny_text: Path, tmp_path: Path):
    other = tmp_path / "other.txt"
    other.write_text("All that glitters is not gold. " * 40)
    out = tmp_path / "figures"
    done = rheostat(
        "eval",
        dial_folder,
        "--data",
        f"{tiny_text},{other}",
        "--compute",
        "1.0,0.9,0.8,0.9",
        *SMALL,
        "--passage",
        30,
        "--out",
        out,
        "--json",
    )
    assert done.status == 0, done.err
    figures = done.figures
    assert [text["name"] for text in figures["texts"]] == ["words", "other"]
    for text in figures["texts"]:
        kinds = [(run["kind"], run["asked"]) for run in text["runs"]]
        rivals = [("dial", c) for c in (0.9, 0.8)]
        wanted = [one for rival in rivals for one in (rival, ("static", rival[1]), ("random", rival[1]))]
        assert kinds == [("dense", 1.0), *wanted]
        dense, first, static = text["runs"][:3]
        assert (dense["ratio"], dense["agreement"], dense["compute"]) == (1.0, 1.0, 1.0)
        assert first["compute"] < 1
        assert first["tokens_per_second"] > 0
        assert static["ffn_fraction"] >= first["ffn_fraction"] - 1e-9  # rounding favours the baseline
    assert figures["provenance"]["artifact_digest"]
    assert json.loads((out / "report.json").read_text()) == figures == read(out / "report.json")
    assert figures["format"] == FORMAT
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    pictures = [f"{name}.png" for name in ("bytes", "experts", "pareto", "positions")]
    wanted = sorted([*pictures, "report.html", "report.json", "report.md", "tokens.png"])
    assert sorted(path.name for path in out.iterdir()) == wanted
    assert figures["base"] == {"name": "model"}
    assert len({text["digest"] for text in figures["texts"]}) == 2
    for text in figures["texts"]:
        assert [use["asked"] for use in text["use"]] == [0.9, 0.8]
        assert len(text["passage"]["tokens"]) == 30
    assert "words: 4 windows of 48" in done.out
    assert "other: baselines: done" in done.err


@pytest.mark.usefixtures("unpainted")
def test_the_card_of_the_artifact_shows_the_figures(rheostat, dial_folder: Path, tiny_text: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(dial_folder, folder)
    arguments = ("eval", folder, "--data", tiny_text, *SMALL, "--compute", 0.9, "--no-baselines", "--passage", 0)
    done = rheostat(*arguments, "--out", folder / "report")
    assert f"model card: {folder / card.NAME} now shows these figures" in done.out
    text = (folder / card.NAME).read_text()
    assert "](report/pareto.png)" in text
    assert "**words**" in text
    assert read(folder / "report" / "report.json")["texts"][0].get("passage") is None
    (folder / card.NAME).write_text("# Mine\n")
    assert "has been edited; left as it is" in rheostat(*arguments, "--out", folder / "report").out
    assert (folder / card.NAME).read_text() == "# Mine\n"
    assert "model card" not in rheostat(*arguments, "--out", tmp_path / "elsewhere").out


@pytest.mark.usefixtures("unpainted")
def test_what_another_command_measured_stays_in_the_report(
    rheostat, dial_folder: Path, tiny_text: Path, tmp_path: Path
):
    arguments = ("eval", dial_folder, "--data", tiny_text, *SMALL, "--compute", 0.9, "--no-baselines")
    assert rheostat(*arguments, "--out", tmp_path).status == 0
    file = tmp_path / "report.json"
    bench = [{"side": "dial 0.9", "compute": 0.9, "tpot_ms": 3.0}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bench": bench}))
    assert rheostat(*arguments, "--out", tmp_path).status == 0
    assert read(file)["bench"] == bench
    assert (tmp_path / "milliseconds.png").is_file()


def test_without_baselines_and_with_the_default_dial(rheostat, dial_folder: Path, tiny_text: Path):
    done = rheostat("eval", dial_folder, "--data", tiny_text, *SMALL, "--no-baselines", "--json")
    assert {run["kind"] for run in done.figures["texts"][0]["runs"]} == {"dense", "dial"}
    low = json.loads((dial_folder / "rheostat.json").read_text())["dial"]["compute"][-1]
    asked = [run["asked"] for run in done.figures["texts"][0]["runs"]]
    assert asked == [c for c in (1.0, 0.9, 0.8, 0.7) if c >= low]


def test_a_dense_model(rheostat, tiny_model_folder: Path, tiny_text: Path, tmp_path: Path):
    done = rheostat("eval", tiny_model_folder, "--data", tiny_text, *SMALL, "--json", "--out", tmp_path)
    assert done.status == 0, done.err
    assert [run["kind"] for run in done.figures["texts"][0]["runs"]] == ["dense"]
    assert done.figures["provenance"]["model_digest"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compute", "0"], "compute=0.0: must be between"),
        (["--compute", "nan"], "compute=nan: must be between"),
        (["--compute", "0.9,1.5"], "compute=1.5: must be between"),
        (["--compute", "0.01"], "compute=0.01: must be between"),
        (["--data", "none"], "data='none': must be an existing file"),
        (["--windows", "0"], "limit=0: must be at least 1"),
        (["--length", "1"], "length=1: must be at least 2"),
        (["--passage", "-1"], "passage=-1: must be 0 or more tokens"),
        (["--length", "300"], "length=300: must be at most 256: this model reads 256 tokens"),
    ],
)
def test_bad_settings(refused, dial_folder: Path, tiny_text: Path, tmp_path: Path, flags: list[str], message: str):
    common = ("eval", dial_folder, "--data", tiny_text, *SMALL, "--out", tmp_path / "figures")
    assert message in refused(*common, *flags)
    assert not list(tmp_path.iterdir())


def test_output_that_cannot_be_written(refused, dial_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    assert "this is a file" in refused("eval", dial_folder, "--out", tmp_path / "file")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("os.access", lambda path, _: str(path) != str(tmp_path / "folder"))
    assert "that can be written" in refused("eval", dial_folder, "--out", tmp_path / "folder")


def test_names_of_texts():
    assert names(["a/x.jsonl.gz", "builtin:heldout", "folder/"]) == {
        "x": "a/x.jsonl.gz",
        "builtin:heldout": "builtin:heldout",
        "folder": "folder/",
    }
    assert list(names(["a/x.txt", "b/x.txt"])) == ["a/x.txt", "b/x.txt"]


# -- tasks


@pytest.fixture(scope="module")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"text": f"He counted to {n}, and then he said: {n}"} for n in range(6)]
    pack_rows(folder, "text/lambada_test.jsonl.gz", rows)
    boolq = [{"passage": "A stone sinks.", "question": "does it sink", "label": "true"} for _ in range(4)]
    pack_rows(folder, "mc/boolq_val.jsonl.gz", boolq)
    pack_rows(folder, "mc/winogrande_dev.jsonl.gz", [])
    return folder


def test_tasks_alone(rheostat, dial_folder: Path, task_data: Path, tmp_path: Path):
    common = ("eval", dial_folder, "--tasks", "boolq,lambada_openai", "--task-data", task_data)
    done = rheostat(*common, "--compute", "1.0,0.9", "--limit", 3, "--out", tmp_path / "out", "--json")
    assert done.status == 0, done.err
    assert done.figures["texts"] == []
    rows = done.figures["tasks"]
    assert {(row["task"], row["rows"]) for row in rows} == {("boolq", 3), ("lambada_openai", 3)}
    dense, dial = [row for row in rows if row["task"] == "boolq" and row["metric"] == "acc"]
    assert (dense["kind"], dense["compute"], dense["spent"], dense["paired_difference"]) == ("dense", 1.0, 1.0, 0)
    assert (dial["kind"], dial["compute"]) == ("dial", 0.9)
    assert dial["spent"] < 1
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == done.figures
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"report.json", "report.md", "report.html", "tasks.png"}
    assert "boolq: 3 rows, prefill+score" in done.out
    assert "boolq at 0.9: done" in done.err
    again = rheostat(*common, "--compute", "1.0,0.9", "--limit", 3, "--json").figures["tasks"]
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in rows]


def test_tasks_and_text(rheostat, tiny_model_folder: Path, task_data: Path, tiny_text: Path, tmp_path: Path):
    flags = ("--tasks", "boolq", "--task-data", task_data, "--data", tiny_text, *SMALL, "--out", tmp_path)
    done = rheostat("eval", tiny_model_folder, *flags, "--json")
    assert done.status == 0, done.err
    assert [len(done.figures[kind]) for kind in ("texts", "tasks")] == [1, 1]  # one metric of one task
    assert (tmp_path / "pareto.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "bolq"], "tasks='bolq': must be one of hellaswag"),
        (["--tasks", "boolq", "--task-data", "nowhere"], "task_data='nowhere': must be an existing folder"),
        (["--tasks", "mmlu"], "must be a folder with mc/mmlu_test_sample.jsonl.gz"),
        (["--tasks", "winogrande"], "must be a file with rows: it is empty"),
        (["--tasks", "boolq", "--limit", "0"], "limit=0: must be at least 1 row"),
        (["--tasks", "boolq", "--batch-tokens", "0"], "batch_tokens=0: must be 1 or more"),
        (["--tasks", "boolq", "--compute", "0.01"], "compute=0.01: must be between"),
        (["--limit", "3", "--tasks", ""], "limit=3: must be left out where no --tasks are asked for"),
    ],
)
def test_bad_settings_of_tasks(
    refused, dial_folder: Path, task_data: Path, flags: list[str], message: str, monkeypatch
):
    import lm_eval.tasks

    class Manager:  # the real one reads thousands of files
        all_tasks, task_index = ("boolq-seq2seq",), {}

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Manager)
    folder = [] if "--task-data" in flags or "" in flags else ["--task-data", task_data]
    assert message in refused("eval", dial_folder, *folder, *flags)


def test_task_data_is_needed(refused, dial_folder: Path):
    assert "task_data: must be given: boolq reads" in refused("eval", dial_folder, "--tasks", "boolq")
