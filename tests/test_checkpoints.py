"""Reading a checkpoint: one line for whatever goes wrong, and the libraries' own chatter as it was before."""

from __future__ import annotations

import pytest
from transformers.utils import logging as transformers_logging

from rheostat.checkpoints import check_weights, ensure_pad_token, one_line, reading
from rheostat.errors import SettingError
from tests.conftest import byte_tokenizer


@pytest.mark.parametrize("error", [OSError("no\n  such\tfile"), KeyError("x"), Exception("many\nlines " * 90)])
def test_whatever_a_parser_raises_is_one_line_about_the_model(error: Exception):
    with pytest.raises(SettingError) as caught, reading("here", "a folder that can be read"):
        raise error
    message = str(caught.value)
    assert message.startswith("model='here': must be a folder that can be read (")
    assert "\n" not in message
    assert len(message) < 300
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [SettingError("dtype=1: must be 2"), MemoryError(), KeyboardInterrupt()])
def test_what_says_more_than_we_know_passes_through(error: BaseException):
    with pytest.raises(type(error)) as caught, reading("here", "there"):
        raise error
    assert caught.value is error


def test_an_error_without_words_is_named():
    assert one_line(RuntimeError()) == "RuntimeError"
    assert one_line(ValueError(" a \n b ")) == "a b"


@pytest.mark.parametrize("had_bars", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_hosts_bars_and_reports_are_as_before(had_bars: bool, fails: bool):
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    try:
        (transformers_logging.enable_progress_bar if had_bars else transformers_logging.disable_progress_bar)()
        transformers_logging.set_verbosity_info()
        try:
            with reading("here", "there"):
                assert not transformers_logging.is_progress_bar_enabled()
                assert transformers_logging.get_verbosity() == transformers_logging.ERROR
                if fails:
                    raise OSError
        except SettingError:
            assert fails
        assert transformers_logging.is_progress_bar_enabled() is had_bars
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
    finally:
        (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
        transformers_logging.set_verbosity(verbosity)


def info(missing=(), mismatched=(), unexpected=()):
    """As `from_pretrained` tells it."""
    mismatches = [(name, (1,), (2,)) for name in mismatched]
    return {"missing_keys": set(missing), "mismatched_keys": mismatches, "unexpected_keys": set(unexpected)}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (info(missing=["b.weight"]), "not without b.weight$"),
        (info(mismatched=["a.weight"]), "not without a.weight$"),
        (info(missing=["z", "b"], mismatched=["a"]), "not without b and 2 more$"),
    ],
)
def test_a_weight_that_would_be_drawn_at_random_is_refused(found, message):
    with pytest.raises(SettingError, match=message):
        check_weights("here", found)


def test_weights_without_a_place_are_a_warning(caplog: pytest.LogCaptureFixture):
    check_weights("here", info())
    assert not caplog.records
    check_weights("here", info(unexpected=["x", "b"]))
    assert [record.getMessage() for record in caplog.records] == ["here: 2 weights have no place in the model, first b"]


def test_padding_falls_back_on_the_end_of_text():
    tokenizer = byte_tokenizer()
    ensure_pad_token("here", tokenizer)
    assert tokenizer.pad_token == "<pad>", "the model's own is kept"
    tokenizer.pad_token = None
    ensure_pad_token("here", tokenizer)
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(SettingError, match="model='here': .* end-of-text token"):
        ensure_pad_token("here", tokenizer)
