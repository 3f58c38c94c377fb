from __future__ import annotations

import pytest

from rheostat.eval.tasks import TASKS
from rheostat.eval.tasks.language import _pages
from tests.eval.conftest import WIKITEXT


def test_wikitext_is_cut_into_articles():
    pages = list(_pages(WIKITEXT))
    assert [page.strip().split("\n")[0].strip() for page in pages] == ["= Stones =", "= Birds ="]
    assert "\n".join(pages) == WIKITEXT
    assert "= = Kinds = =" in pages[0]
    assert list(_pages(" \n\n")) == []


def test_wikitext_is_read_as_plain_text_and_counted_as_written(data_folder):
    (task,) = TASKS["wikitext"](data_folder)
    task.build_all_requests()
    assert [instance.request_type for instance in task.instances] == ["loglikelihood_rolling"] * 2
    (text,) = task.instances[0].args
    assert "heavy, and" in text  # detokenised
    assert "There are-many" in text
    found = task.process_results(task.eval_docs[0], (-7.0,))
    words = len(task.eval_docs[0]["page"].split())
    assert found["word_perplexity"][0] == -7.0
    assert found["word_perplexity"][1] == pytest.approx(words, abs=2)  # the ends are counted too, as lm-eval does


def test_lambada_asks_for_the_last_word(data_folder):
    (task,) = TASKS["lambada_openai"](data_folder)
    task.build_all_requests()
    assert task.instances[2].args == ("He counted to 2, and then he said:", " 2")
    assert task.process_results(task.eval_docs[0], [(-0.5, True)]) == {"perplexity": -0.5, "acc": 1}
