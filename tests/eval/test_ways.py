from __future__ import annotations

import pytest

from rheostat.errors import SettingError
from rheostat.eval.ways import MAX_NEW_TOKENS, Way
from rheostat.sampling import Sampling


def way(**settings: object) -> Way:
    return Way.of(settings, end="</s>", max_length=300)


def test_what_a_task_leaves_out():
    one = way(until=["\n"])
    assert set(one.until) == {"\n", "</s>"}
    assert (one.limit, one.sampling) == (MAX_NEW_TOKENS, Sampling())


def test_drawing_is_on_only_when_asked():
    assert way(until=[], do_sample=False, temperature=0.7, top_k=5).sampling == Sampling()
    drawn = way(until=[], do_sample=True, temperature=0.7, top_k=5, top_p=0.9).sampling
    assert drawn == Sampling(temperature=0.7, top_k=5, top_p=0.9)


def test_answers_are_cut_at_the_first_stop_string():
    one = way(until=["\n", "##"], max_gen_toks=12)
    assert one.limit == 12
    assert one.cut("yes ## no\nmaybe") == "yes "
    assert one.cut("yes") == "yes"
    assert one.is_done("so #") is False
    assert one.is_done("so ##") is True


def test_the_tail_is_long_enough_for_every_stop_string():
    assert way(until=["é" * 10]).reach >= 20  # each may be two tokens of a byte
    assert way(until=[]).reach >= len("</s>")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": 300}, "max_gen_toks=300: must be between 1 and 299"),
        ({"max_gen_toks": 0}, "max_gen_toks=0: must be between 1 and 299"),
        ({"num_beams": 4}, "generation_kwargs.num_beams=4: must be left out"),
    ],
)
def test_what_cannot_be_met_is_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        way(until=[], **settings)
