from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rheostat.eval.marking import (
    best_subspan_em,
    completed_program,
    cut,
    exact_match,
    fenced_code,
    last_number,
    longest_common,
    marked_number,
    normalise,
    opened_code,
    rouge_l,
    token_f1,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Beatles!", "beatles"),
        ("an apple, a pear\nand the theatre", "apple pear and theatre"),
        ("U.S.A.", "usa"),
        ("Röntgen", "röntgen"),
        ("the", ""),
        ("...", ""),
    ],
)
def test_normalise(text: str, expected: str):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "within"),
    [
        (" The Beatles.", ["beatles"], 1, 1),
        ("It was the Beatles", ["Beatles", "Wings"], 0, 1),
        ("Wings", ["Beatles", "Wings"], 1, 1),
        ("Beat", ["Beatles"], 0, 0),
        ("", ["Beatles"], 0, 0),
        ("I do not know.\nThe Beatles", ["Beatles"], 0, 0),  # only the first line counts
        ("anything", ["The The"], 0, 0),  # nothing is left of this answer
        ("anything", [], 0, 0),
    ],
)
def test_short_answers(prediction: str, answers: list[str], exact: int, within: int):
    assert exact_match(prediction, answers) == exact
    assert best_subspan_em(prediction, answers) == within


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("the red house", ["a red house"], 1),
        ("red house", ["red car"], 0.5),
        ("red red red", ["red"], 0.5),  # a word counts as often as it is in both
        ("blue", ["red", "blue sky"], 2 / 3),
        ("", ["red"], 0),
        ("", ["the"], 1),
        ("red", [], 0),
    ],
)
def test_token_f1(prediction: str, answers: list[str], score: float):
    assert token_f1(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [("", "abc", 0), ("abc", "abc", 3), ("axbycz", "abc", 3), ("abc", "cba", 1), ("abcbdab", "bdcaba", 4)],
)
def test_longest_common(first: str, second: str, length: int):
    assert longest_common(first, second) == length
    assert longest_common(second, first) == length


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("The cat sat.", "the cat sat", 1),
        ("the cat is on the mat", "the cat sat on a mat", 2 * 4 / 12),
        ("", "the cat", 0),
        ("...", "...", 0),
    ],
)
def test_rouge_l(prediction: str, reference: str, score: float):
    assert rouge_l(prediction, reference) == pytest.approx(score)


words = st.lists(st.sampled_from(["the", "cat", "Sat", "on", "2", "mat.", "it's", "é"]), max_size=12).map(" ".join)


@settings(deadline=None)  # the first call imports
@given(words, words)
def test_rouge_l_is_googles(prediction: str, reference: str):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    assert rouge_l(prediction, reference) == pytest.approx(scorer.score(reference, prediction)["rougeL"].fmeasure)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $18 every day.", "18"),
        ("so 16-3-4=9", "9"),
        ("5 apples - 3 apples", "3"),
        ("the answer is 5-4", "4"),
        ("it is -4", "-4"),
        ("it is -$4.50.", "-4.50"),
        ("1,234,567 in all", "1234567"),
        ("1,2,3", "3"),
        ("18.00", "18"),
        ("a half is .5", ".5"),
        ("10%", "10"),
        (r"\boxed{42}", "42"),
        ("3. 4.", "4"),
    ],
)
def test_last_number(text: str, number: str):
    assert last_number(text) == Decimal(number)


def test_no_number():
    assert last_number("none at all") is None
    assert last_number("") is None
    assert last_number("...,-$") is None
    assert marked_number("The answer is 18") is None
    assert marked_number("#### none") is None


def test_marked_number():
    assert marked_number("9 * 2 = 18\n#### 18\n\nand 20 more") == 18
    assert marked_number("#### $1,000.") == 1000
    assert marked_number("#### -5\n#### 6") == -5  # the first, as in lm-eval


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1", "x = 1"),  # cut off by the limit on tokens
        ("```python\nx = 1\n```\n```python\nx = 2\n```", "x = 1\n"),
        ("  ```python\n  x = 1\n  ```", "  x = 1\n"),
        ("x = 1", None),
        ("Use `x` and ``` nothing", None),
        ("x = 1\n```", None),  # ends only, with nothing after it
    ],
)
def test_fenced_code(text: str, code: str | None):
    assert (fenced_code(text) or None) == code


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1\n```\nThis is x.", "x = 1\n"),
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```\nThis is x.", "x = 1\n"),
        ("\n```python\nx = 1", "x = 1"),
        ("", ""),
    ],
)
def test_opened_code(text: str, code: str):
    assert opened_code(text) == code


def test_cut():
    assert cut("a\ndef b", ["\nclass", "\ndef"]) == "a"
    assert cut("a b c", ["c", "b"]) == "a "
    assert cut("a", ["b"]) == "a"
    assert cut("a", []) == "a"


PROMPT = 'def double(x):\n    """Twice x."""\n'
STOPS = ["\ndef", "\nprint"]


@pytest.mark.parametrize(
    "completion",
    [
        "    return 2 * x\n",
        "    return 2 * x\n\ndef other(:",
        "    return 2 * x\n\nprint(double('",
        "    return 2 * x\n```\n\nThis doubles x.",
        "```python\n    return 2 * x\n```\nThis doubles x.",
        "Sure!\n```python\ndef double(x):\n    return 2 * x\n```",
        "Sure!\n```python\nimport math\n\ndef double(x: int):\n    return 2 * x",
    ],
)
def test_completed_program(completion: str):
    namespace: dict[str, object] = {}
    exec(completed_program(PROMPT, completion, "double", STOPS), namespace)
    assert namespace["double"](3) == 6  # type: ignore[operator]


def test_a_completion_of_nothing_is_the_prompt():
    assert completed_program(PROMPT, "", "double", STOPS) == PROMPT
