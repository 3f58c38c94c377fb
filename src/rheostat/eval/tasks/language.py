"""Language modelling: the perplexity of WikiText-2, and LAMBADA's last words, as lm-eval's own tasks have them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rheostat.eval.tasks.local import make_task, rows, text

if TYPE_CHECKING:
    from lm_eval.api.task import Task

WIKITEXT = {
    "task": "wikitext",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "metric_list": [
        {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
    ],
}
LAMBADA = {
    "task": "lambada_openai",
    "output_type": "loglikelihood",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}


def _wikitext(folder: Path) -> list[Task]:
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    pages = [{"page": page} for page in _pages(text(folder, "text/wikitext2_raw_test.txt.gz"))]
    return [make_task(WIKITEXT | {"doc_to_target": wikitext_detokenizer, "process_results": process_results}, pages)]


def _pages(whole: str) -> Iterator[str]:
    """The articles of a WikiText file, each with its title; a title is a line `= Title =`, a section has more signs."""
    page: list[str] = []
    for line in whole.split("\n"):
        if re.fullmatch(r"= [^=](.*[^=])? =", line.strip()) and "\n".join(page).strip():
            yield "\n".join(page)
            page = []
        page.append(line)
    if "\n".join(page).strip():
        yield "\n".join(page)


def _lambada(folder: Path) -> list[Task]:
    found = rows(folder, "text/lambada_test.jsonl.gz")
    return [make_task(LAMBADA, [{"text": row["text"]} for row in found])]


LANGUAGE_TASKS: dict[str, Callable[[Path], list[Task]]] = {"wikitext": _wikitext, "lambada_openai": _lambada}
