from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from rheostat.errors import SettingError
from rheostat.eval.tasks import programs
from tests.eval.tasks.asking import build, evaluate, prompts, requests, score, write_rows

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is for Linux")

PROMPT = 'def double(x):\n    """Twice x."""\n'
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": PROMPT,
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
}
RIGHT = "    return 2 * x\n"


def mbpp_row(number: int, **changes: Any) -> dict[str, Any]:
    name = f"add{number}"
    return {
        "text": f"Add {number}.",
        "code": f"def {name}(x):\r\n    return x + {number}",
        "task_id": number,
        "test_setup_code": "",
        "test_list": [f"assert {name}({x}) == {x + number}" for x in range(3)],
        "challenge_test_list": ["assert False"],
    } | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path, "code/mbpp.jsonl.gz", [mbpp_row(number) for number in (1, 2, 3, 4, 10, 11, 510, 511)])
    return write_rows(tmp_path, "code/humaneval.jsonl.gz", [HUMANEVAL])


def test_humaneval(folder: Path):
    (request,) = requests(build(folder, "humaneval"))
    assert request.args[0] == PROMPT
    assert request.args[1]["max_gen_toks"] == 1024
    assert "\ndef" in request.args[1]["until"]


def test_humaneval_for_instruct_models(folder: Path):
    (prompt,) = prompts(build(folder, "humaneval_instruct"))
    asked = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n"
    assert prompt.startswith(f"{asked}{PROMPT}\n```\n")
    assert prompt.endswith(f"Here is the completed function:\n```python\n{PROMPT}\n")


@pytest.mark.parametrize("name", ["humaneval", "humaneval_instruct"])
@pytest.mark.parametrize(
    ("completion", "passes"),
    [
        (RIGHT, 1),
        (f"{RIGHT}\nprint(double(", 1),  # a model that does not stop
        (f"{RIGHT}```\nThis doubles x.", 1),
        (f"```python\n{PROMPT}{RIGHT}```", 1),
        ("    return x + 2\n", 0),
        ("", 0),
        ("    return", 0),
        ("    return 2 * (x", 0),
        ("    raise SystemExit(0)\n", 0),
        ("    import os\n    os._exit(0)\n", 0),
        ('    """', 0),
    ],
)
def test_marks(folder: Path, name: str, completion: str, passes: int):
    assert score(build(folder, name), completion) == {"pass@1": passes}


@pytest.mark.parametrize(
    "completion",
    [
        "    while True: pass\n",
        "    import os\n    while True: os.fork()\n",
        "    import socket\n    return socket.socket() and 2 * x\n",
        "    y = [0] * 10**10\n    return 2 * x\n",
        "    while True: print(x)\n",
    ],
    ids=["loop", "fork", "socket", "memory", "print"],
)
def test_harmful_programs_fail(folder: Path, completion: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(programs, "SECONDS", 1.0)
    assert score(build(folder, "humaneval"), completion) == {"pass@1": 0}


def test_one_bad_program_is_one_failed_row(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(programs, "SECONDS", 1.0)
    write_rows(folder, "code/humaneval.jsonl.gz", [HUMANEVAL, HUMANEVAL | {"prompt": f"# slow\n{PROMPT}"}])
    task = build(folder, "humaneval")
    bad = "    while True: pass\n"
    assert evaluate(task, lambda prompt: bad if "slow" in prompt else RIGHT) == {"pass@1": 0.5}


def test_programs_run_only_where_the_user_allows_it(folder: Path):
    """lm-eval and `rheostat eval` ask before they run such a task."""
    assert all(build(folder, name).UNSAFE_CODE for name in programs.PROGRAM_TASKS)


def test_mbpp(folder: Path):
    task = build(folder, "mbpp")
    assert [row["number"] for row in task.test_docs()] == [11, 510]
    request = requests(task)[0]
    tests = "\n".join(mbpp_row(11)["test_list"])
    head = "You are an expert Python programmer, and here is your task: "
    assert request.args[0].endswith(f"{head}Add 11. Your code should pass these tests:\n\n{tests}\n[BEGIN]\n")
    assert request.args[0].count("[BEGIN]\ndef add") == request.args[0].count("[DONE]") == 3
    assert "\r" not in request.args[0]
    assert request.args[1] == {"until": ["[DONE]"], "do_sample": False, "max_gen_toks": 512}


def test_mbpp_for_instruct_models(folder: Path):
    request = requests(build(folder, "mbpp_instruct"))[0]
    assert request.args[0].endswith("assert add11(2) == 13\n```python\n")
    assert request.args[0].count("\n```python\ndef add") == 3
    assert request.args[1]["until"] == ["\n```"]


@pytest.mark.parametrize(
    ("name", "text", "passes"),
    [
        ("mbpp", "def add11(x):\n    return x + 11\n[DONE]\nassert False", 1),
        ("mbpp", "```python\ndef add11(x):\n    return x + 11\n```", 1),
        ("mbpp", "def add11(x):\n    return 11\n[DONE]", 0),
        ("mbpp", "raise SystemExit", 0),
        ("mbpp", "", 0),
        ("mbpp_instruct", "def add11(x):\n    return x + 11\n```\nThis adds.", 1),
        ("mbpp_instruct", "```python\ndef add11(x):\n    return x + 11", 1),
        ("mbpp_instruct", "def add11(x):\n    return 11", 0),
    ],
)
def test_mbpp_marks(folder: Path, name: str, text: str, passes: int):
    assert score(build(folder, name), text) == {"pass@1": passes}


def test_the_set_up_of_the_tests_is_run(folder: Path):
    rows = [mbpp_row(n) for n in (2, 3, 4)] + [
        mbpp_row(11, test_setup_code="Y = 1", test_list=["assert add11(Y) == 12"])
    ]
    task = build(write_rows(folder, "code/mbpp.jsonl.gz", rows), "mbpp")
    assert score(task, "def add11(x):\n    return x + 11") == {"pass@1": 1}


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("humaneval", [HUMANEVAL, {"task_id": "x"}], r"humaneval.jsonl.gz, row 2'.*KeyError: 'entry_point'"),
        ("humaneval", [HUMANEVAL | {"entry_point": "f()"}], r"row 1'.*entry_point is 'f\(\)', not a name"),
        ("mbpp", [mbpp_row(11, test_list=[])], r"mbpp.jsonl.gz, row 1'.*test_list is empty"),
        ("mbpp", [mbpp_row(11, task_id="x")], r"row 1'.*task_id must be a whole number"),
        ("mbpp", [mbpp_row(11)], r"a file with the prompt tasks \(2, 3, 4\)"),
        ("mbpp", [mbpp_row(n) for n in (2, 3, 4)], r"tasks='mbpp': must be a task with rows"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, name: str, rows: list[dict[str, Any]], message: str):
    with pytest.raises(SettingError, match=message):
        build(write_rows(tmp_path, f"code/{name}.jsonl.gz", rows), name)
