from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rheostat.errors import SettingError
from tests.eval.tasks.asking import build, prompts, requests, score, write_rows

pytest.importorskip("lm_eval")

EXAMPLES = [{"row": n, "question": f"What is {n} and 1?", "answer": f"{n}+1={n + 1}\n#### {n + 1}"} for n in range(7)]
SVAMP = {"Body": "Ann has 3 pears", "Question": "How many?", "Answer": 3.0, "Equation": "3.0", "Type": "x", "ID": "c"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path, "math/gsm8k_train.jsonl.gz", EXAMPLES)
    write_rows(tmp_path, "math/svamp.jsonl.gz", [SVAMP])
    write_rows(tmp_path, "math/math500.jsonl.gz", [{"row": 0, "problem": "Halve $1$.", "answer": "\\frac{1}{2}"}])
    return write_rows(tmp_path, "math/gsm8k_test.jsonl.gz", [{"question": "How much?", "answer": "So\n#### 1,218"}])


def test_gsm8k(folder: Path):
    task = build(folder, "gsm8k")
    (request,) = requests(task)
    parts = request.args[0].split("\n\n")
    assert parts[0] == "Question: What is 0 and 1?\nAnswer: 0+1=1\n#### 1"
    assert len(parts) == 6
    assert parts[-1] == "Question: How much?\nAnswer:"
    assert request.args[1] == {
        "until": ["Question:", "</s>", "<|im_end|>"],
        "do_sample": False,
        "max_gen_toks": 256,
    }


@pytest.mark.parametrize(
    ("text", "last", "strict"),
    [
        (" 609 * 2 = 1218\n#### 1218", 1, 1),
        (" She pays $1,218.00.", 1, 0),
        ("#### 1218\n\nThen 5 more.", 0, 1),
        ("#### 1217", 0, 0),
        ("1,218 or 1,219", 0, 0),
        ("", 0, 0),
    ],
)
def test_marks(folder: Path, text: str, last: int, strict: int):
    assert score(build(folder, "gsm8k"), text) == {"exact_match": last, "exact_match_strict": strict}


def test_svamp(folder: Path):
    task = build(folder, "svamp")
    assert prompts(task)[0].split("\n\n")[-1] == "Question: Ann has 3 pears. How many?\nAnswer:"
    assert score(task, " 3 pears") == {"exact_match": 1, "exact_match_strict": 0}
    assert score(task, " 30 pears") == {"exact_match": 0, "exact_match_strict": 0}


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        (r"It is \boxed{\frac{1}{2}}.", 1),
        (r"First \boxed{2}, no: \boxed{\frac12}", 1),
        (r"It is \boxed{0.5}", 1),
        (r"It is \boxed{2}", 0),
        (r"It is \frac{1}{2}", 0),
        (r"It is \boxed{\frac{1}{2}", 0),
        (r"\boxed{}", 0),
        ("", 0),
    ],
)
def test_math500(folder: Path, text: str, is_right: int):
    task = build(folder, "math500")
    assert prompts(task) == ["Halve $1$.\nPlease reason step by step, and put your final answer within \\boxed{}."]
    assert score(task, text) == {"exact_match": is_right}


@pytest.mark.parametrize(
    ("name", "file", "row", "message"),
    [
        ("gsm8k", "gsm8k_test", {"question": "How?", "answer": "18"}, "does not end in #### and a number"),
        ("gsm8k", "gsm8k_test", {"answer": "#### 18"}, "KeyError: 'question'"),
        ("gsm8k", "gsm8k_train", {"question": "How?"}, "KeyError: 'answer'"),
        ("svamp", "svamp", SVAMP | {"Answer": "3"}, "Answer is of type str, not a number"),
        ("math500", "math500", {"problem": "Halve."}, "KeyError: 'answer'"),
    ],
)
def test_a_bad_row_is_named(folder: Path, name: str, file: str, row: dict[str, Any], message: str):
    write_rows(folder, f"math/{file}.jsonl.gz", [row])
    with pytest.raises(SettingError, match=f"math/{file}.jsonl.gz, row 1'.*{message}"):
        build(folder, name)
