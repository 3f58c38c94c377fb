"""The lean tokenizer gives the tokens and the text of `transformers`; where it might not, it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rheostat.skeleton import Unknown
from rheostat.wording import Wording

TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ eos_token }}\n{% endif %}"
    "  {% if m['content'] is not string %}{{ m['content'] | tojson }}{% continue %}{% endif %}\n"
    "{{ m['role'] + ': ' + m['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}{% if tools %}tools{% endif %}"
)
TEXTS = ["Hello", " two  spaces\n\n1. list 23", "naïve café – 東京 🙂", "<|im_end|> in the text <|im_start|>", ""]


@pytest.fixture
def folder(tiny_tokenizer: Any, tmp_path: Path) -> Path:
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


def edit(folder: Path, **changes: object) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_tokens_and_text_are_those_of_transformers(folder):
    ours, theirs = Wording(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours(text)["input_ids"].tolist() == [ids]
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompts", [False, True])
def test_conversations_are_those_of_transformers(folder, text, prompts):
    talk = [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
    how: dict[str, Any] = {"add_generation_prompt": prompts, "return_tensors": "pt", "return_dict": True}
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(talk, **how)["input_ids"]
    assert Wording(folder).apply_chat_template(talk, **how)["input_ids"].tolist() == theirs.tolist()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, "kind LlamaTokenizer"),
        ({"add_bos_token": True}, "setting add_bos_token"),
        ({"clean_up_tokenization_spaces": True}, "setting clean_up"),
        ({"eos_token": "<never seen>"}, "special token '<never seen>'"),
    ],
)
def test_what_transformers_would_add_is_unknown(folder, changes, reason):
    edit(folder, **changes)
    with pytest.raises(Unknown, match=reason):
        Wording(folder)


@pytest.mark.parametrize(
    "template", ["{% set n = namespace(a=1) %}", "{% generation %}x{% endgeneration %}", "{% if %}"]
)
def test_templates_that_need_more_are_unknown(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(Unknown, match="chat template"):
        Wording(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_are_left_to_transformers(folder, name):
    (folder / name).write_text("{")
    with pytest.raises(Unknown, match="cannot be read"):
        Wording(folder)


def test_templates_run_in_a_sandbox(folder):
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}{{ raise_exception('no') }}")
    with pytest.raises(Exception, match="unsafe|no"):
        Wording(folder).apply_chat_template([{"role": "user", "content": "x"}])
