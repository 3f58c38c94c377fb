from __future__ import annotations

import builtins
import gzip

import pytest

from rheostat.errors import SettingError
from rheostat.eval.tasks.local import convert, make_task, require_lm_eval, rows, text

CONFIG = {
    "task": "echo",
    "output_type": "generate_until",
    "doc_to_text": "Say {{word}}:",
    "doc_to_target": "word",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def test_rows_and_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": "\\u2028 é"}\r\n\n{"x": 2}\n')
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("é\n".encode()))
    assert rows(tmp_path, "a.jsonl") == [{"x": "\u2028 é"}, {"x": 2}]
    assert text(tmp_path, "b.txt.gz") == "é\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"must be a folder with a.jsonl.gz"),
        (b"", "a file with rows: it is empty"),
        (gzip.compress(b"\n\n", mtime=0), "a file with rows: it is empty"),
        (gzip.compress(b'{"x": 1}\n[1]\n', mtime=0), r"a.jsonl.gz, line 2': must be a JSON object"),
        (gzip.compress(b'{"x": 1', mtime=0), "line 1'?: must be a JSON object"),
        (gzip.compress(b"\xff", mtime=0), "must be UTF-8 text: byte 0 is not"),
        (gzip.compress(b'{"x": 1}', mtime=0)[:-3], "must be a complete gzip file"),
        (b"plain", "must be a complete gzip file"),
    ],
)
def test_files_that_cannot_be_read(content, message, tmp_path):
    if content is not None:
        (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(SettingError, match=message) as caught:
        rows(tmp_path, "a.jsonl.gz")
    assert "\n" not in str(caught.value)


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(SettingError, match="must be a file that can be read"):
        rows(tmp_path, "a.jsonl")


def test_conversion_names_the_row(tmp_path):
    found = [{"n": "1"}, {"n": "x"}]
    with pytest.raises(SettingError, match=r"f.jsonl, row 2'?: must be a row of this task \(ValueError: "):
        convert(found, lambda row: {"n": int(row["n"])}, tmp_path / "f.jsonl")
    assert convert(found[:1], lambda row: {"n": int(row["n"])}, tmp_path) == [{"n": 1}]


def test_a_task_from_rows_in_memory():
    task = make_task(CONFIG, [{"word": "one"}, {"word": "two"}])
    task.build_all_requests()
    assert [instance.args[0] for instance in task.instances] == ["Say one:", "Say two:"]
    assert task.process_results(task.eval_docs[1], ["two"]) == {"exact_match": 1.0}
    assert len(task.eval_docs) == 2


def test_examples_come_before_the_question():
    shots = {"num_fewshot": 1, "fewshot_config": {"sampler": "first_n", "samples": [{"word": "zero"}]}}
    task = make_task(CONFIG | shots, [{"word": "one"}])
    task.build_all_requests()
    assert task.instances[0].args[0] == "Say zero: zero\n\nSay one:"


def test_a_task_needs_rows():
    with pytest.raises(SettingError, match="tasks='echo': must be a task with rows: it has none"):
        make_task(CONFIG, [])


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "lm_eval":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SettingError, match=r"pip install 'rheostat\[eval\]'"):
        require_lm_eval()
