"""Marking answers that a model wrote: pure functions from texts to scores, and from texts to the answer in them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBER = re.compile(
    r"(?:(?<![\w.)])-)?(?:\$-?)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?:(?<![\w.)])-)?(?<![\w.])\.\d+"
)
"""A number in a text: a minus that stands between no two things, a dollar sign, commas between thousands, decimals."""
MARKED_NUMBER = re.compile(r"####\s*(-?[$0-9.,]+)")
"""How GSM8K's own answers end."""
FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


# -- short answers


def normalise(text: str) -> str:
    """Lower case, without punctuation and English articles, single spaces: SQuAD's normalisation."""
    bare = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", bare).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is one of the answers, both normalised."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


def best_subspan_em(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if one of the answers stands in the first line of the prediction, all normalised.

    As published with "Lost in the Middle": only the first line, because a model that copies its whole prompt would
    also copy the answer. An answer of which normalisation leaves nothing counts only as an empty prediction;
    as published, it would stand in every text.
    """
    found = normalise(prediction.split("\n")[0])
    wanted = [normalise(answer) for answer in answers]
    return float(any(answer in found if answer else not found for answer in wanted))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 over the answers, of normalised words as bags: SQuAD's measure, 0 to 1."""
    return max((_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers), default=0.0)


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    num_common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * num_common / (len(found) + len(wanted))


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L: the F1, 0 to 1, of the longest common subsequence of words.

    Words are runs of letters a to z and digits in lower case, without stemming, as in Google's `rouge_score`.
    """
    found, wanted = (re.findall(r"[a-z0-9]+", text.lower()) for text in (prediction, reference))
    if not found or not wanted:
        return 0.0
    return 2 * longest_common(found, wanted) / (len(found) + len(wanted))


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence; time is the product of the lengths."""
    lengths = [0] * (len(second) + 1)  # of `first` so far and each prefix of `second`
    for one in first:
        diagonal = 0
        for at, other in enumerate(second, start=1):
            diagonal, lengths[at] = lengths[at], diagonal + 1 if one == other else max(lengths[at], lengths[at - 1])
    return lengths[-1]


# -- numbers


def marked_number(text: str) -> Decimal | None:
    """The number after the first `####`, as GSM8K's answers end (lm-eval's "strict match"), or None."""
    found = MARKED_NUMBER.search(text)
    return last_number(found[1]) if found else None


def last_number(text: str) -> Decimal | None:
    """The last number in a text (lm-eval's "flexible extract"), or None.

    Numbers come back as numbers, so that 18, 18.00 and $18 are the same; lm-eval compares their digits.
    """
    found = [match[0] for match in NUMBER.finditer(text)]
    return Decimal(re.sub(r"[,$\s]", "", found[-1])) if found else None


# -- programs


def fenced_code(text: str) -> str | None:
    """The text in the first Markdown fence, which may lack its end; None where there is no fence."""
    found = FENCE.search(text)
    return found[1] if found else None


def cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings in it; all of it where there is none."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def opened_code(text: str) -> str:
    """The code in a text that goes on inside a fence: up to its end, or in a fence that the text itself begins with."""
    return (fenced_code(text) if text.lstrip().startswith("```") else None) or cut(text, ["```"])


def completed_program(prompt: str, completion: str, entry_point: str, stops: Sequence[str] = ()) -> str:
    """The whole program for a prompt that ends within the function `entry_point`.

    Args:
        completion: raw code that goes on where the prompt ends (cut at the first of `stops`, and at the end of a
            fence), or text with a Markdown fence, which holds that code or the function anew.
    """
    first = next((line for line in completion.split("\n") if line.strip()), "")
    is_raw = first[:1].isspace() and not first.lstrip().startswith("```")  # the inside of a function is indented
    block = None if is_raw else fenced_code(completion)
    if block is None:
        return prompt + cut(completion, [*stops, "```"])
    is_anew = re.search(rf"^def\s+{re.escape(entry_point)}\b", block, re.MULTILINE) is not None
    return f"{prompt}\n\n{block}" if is_anew else prompt + block
