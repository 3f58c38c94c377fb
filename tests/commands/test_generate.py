from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rheostat as api
from rheostat import terminal
from rheostat.commands.writer import Writer
from tests.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()


def test_text_and_bill(rheostat, dial_folder: Path):
    done = rheostat("generate", dial_folder, "Hello", "--max-new-tokens", 9, "--compute", "1.0,0.8", "--json")
    assert done.status == 0, done.err
    assert done.err == ""
    dense, cheap = done.figures["answers"]
    assert dense["asked"] == {"prefill": 1.0, "decode": 1.0}
    assert dense["bill"]["compute"] == 1.0
    assert set(dense["ffn_fractions"]) == {1.0}
    assert cheap["bill"]["compute"] < 1
    bill = cheap["bill"]
    assert bill["prompt_tokens"] == 5
    assert bill["new_tokens"] == len(cheap["token_ids"]) == len(cheap["tokens"]) == len(cheap["ffn_fractions"])
    assert bill["flops"] < bill["dense_flops"]
    assert bill["ms_per_token"] > 0
    assert done.figures["provenance"]["artifact_digest"]
    assert f"compute  {bill['compute']:.3f} of dense spent, 0.8 asked" in done.out
    assert "▇" in done.out or "▆" in done.out or "▅" in done.out
    assert "\x1b" not in done.out


def test_the_same_tokens_as_the_library_with_the_same_widths(rheostat, dial_folder: Path):
    """The width shown with a token is that of the pass whose logits chose it."""
    figures = rheostat("generate", dial_folder, "Rivers", "--max-new-tokens", 6, "--compute", "0.8", "--json").figures
    answer = figures["answers"][0]
    adapted, tokenizer = api.load(str(dial_folder))
    inputs = tokenizer("Rivers", return_tensors="pt")
    with api.spend(0.8, hold=True) as meter, torch.inference_mode():
        out = adapted.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=6,
            do_sample=False,
        )
    assert out[0, 6:].tolist() == answer["token_ids"]
    assert meter.token_fractions()[5:] == pytest.approx(answer["ffn_fractions"])


def test_the_runtime_can_be_chosen(rheostat, refused, dial_folder: Path):
    common = ("generate", dial_folder, "Rivers", "--max-new-tokens", 6, "--compute", "0.8", "--json")
    answers = {}
    for name in ("stock", "native"):
        done = rheostat(*common, "--runtime", name)
        answers[name] = done.figures["answers"][0]
        assert f"({answers[name]['runtime']})" in done.out
    assert answers["stock"]["runtime"] == "transformers"
    assert answers["native"]["runtime"] == "native fp32"
    assert answers["stock"]["token_ids"] == answers["native"]["token_ids"]
    assert answers["stock"]["bill"]["cost"] == answers["native"]["bill"]["cost"]
    low = rheostat(*common, "--runtime", "native", "--weights", "bf16").figures["answers"][0]
    assert low["runtime"] == "native bf16"
    assert "runtime='ours': must be one of auto" in refused(*common, "--runtime", "ours")
    assert "weights='int3': must be one of auto" in refused(*common, "--weights", "int3")


def test_an_answer_ends_at_what_was_asked_unless_it_is_left_to_the_table(rheostat, refused, dial_folder: Path):
    common = ("generate", dial_folder, "Rivers run", "--max-new-tokens", 40, "--compute", "0.8", "--json")
    held, free = (rheostat(*common, flag).figures["answers"][0] for flag in ("--hold", "--no-hold"))
    assert rheostat(*common).figures["answers"][0]["token_ids"] == held["token_ids"]
    assert held["bill"]["compute"] == pytest.approx(0.8, abs=0.015)
    adapted, tokenizer = api.load(str(dial_folder))
    with api.spend(0.8) as meter, torch.inference_mode():
        adapted.generate(**tokenizer("Rivers run", return_tensors="pt"), max_new_tokens=40, do_sample=False)
    assert free["bill"]["compute"] == pytest.approx(meter.compute)
    assert abs(free["bill"]["compute"] - 0.8) > abs(held["bill"]["compute"] - 0.8)
    assert "hold=True: must be left out with --draft" in refused(*common, "--hold", "--draft", "prompt_lookup")


def test_phases_apart(rheostat, dial_folder: Path):
    common = ("generate", dial_folder, "Hello", "--max-new-tokens", 3, "--prefill-compute", "0.8", "--json")
    answer = rheostat(*common).figures["answers"][0]
    assert answer["asked"] == {"prefill": 0.8, "decode": 1.0}
    assert answer["ffn_fractions"][1:] == [1.0, 1.0]


def test_sampling_follows_the_seed(rheostat, dial_folder: Path):
    common = (
        "generate",
        dial_folder,
        "Hello",
        "--max-new-tokens",
        12,
        "--temperature",
        "1.5",
        "--json",
        "--seed",
    )
    answers = [rheostat(*common, seed).figures["answers"][0] for seed in (1, 1, 2, 3, 4)]
    assert answers[0]["token_ids"] == answers[1]["token_ids"] != answers[2]["token_ids"]
    for answer in answers:  # random bytes, which often end in the middle of a character
        assert answer["text"] == TOKENIZER.decode(answer["token_ids"], skip_special_tokens=True)
    assert any(answer["text"].endswith("\ufffd") for answer in answers)


def test_colours_on_a_terminal(rheostat, dial_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(terminal, "uses_colour", lambda _: True)
    arguments = ("generate", dial_folder, "Hello", "--max-new-tokens", 4)
    assert f"48;5;{terminal.RAMP[-1]}m" in rheostat(*arguments).out.splitlines()[1]
    assert "FFN width" in rheostat(*arguments).out.splitlines()[0]


def test_a_dense_model(rheostat, refused, tiny_model_folder: Path):
    done = rheostat("generate", tiny_model_folder, "Hello", "--max-new-tokens", 3, "--json")
    assert done.status == 0, done.err
    assert done.figures["provenance"]["model_digest"]
    assert "no calibrated dial" in refused("generate", tiny_model_folder, "Hello", "--compute", "0.8")


def test_the_chat_template_is_used_where_there_is_one(rheostat, refused, tiny_model_folder: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    model = tmp_path / "chat"
    AutoModelForCausalLM.from_pretrained(tiny_model_folder).save_pretrained(model)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    tokenizer.save_pretrained(model)

    def num_tokens(*arguments: object) -> int:
        done = rheostat("generate", *arguments, "--max-new-tokens", 2, "--json")
        assert done.status == 0, done.err
        return done.figures["answers"][0]["bill"]["prompt_tokens"]

    assert num_tokens(model, "Hello") == 7
    assert num_tokens(model, "Hello", "--no-chat") == 5
    assert "chat=True: must be off" in refused("generate", tiny_model_folder, "Hello", "--chat")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Hi", "--compute", "0"], "compute=0.0: must be between"),
        (["Hi", "--compute", "nan"], "compute=nan: must be between"),
        (["Hi", "--compute", "1.5"], "compute=1.5: must be between"),
        (["Hi", "--compute", "1.0,0.01"], "compute=0.01: must be between"),
        (["Hi", "--decode-compute", "0.01"], "error: decode_compute=0.01: must be between"),
        (["Hi", "--compute", "low"], "must be of type float"),
        (["Hi", "--compute", ","], "compute=(): must be at least one number"),
        (["Hi", "--max-new-tokens", "0"], "max_new_tokens=0: must be 1 or more"),
        (
            ["Hi", "--max-new-tokens", "255"],
            "max_new_tokens=255: must be at most 254: this model reads 256 tokens",
        ),
        (["x" * 300, "--max-new-tokens", "2"], "error: prompt of 300 tokens: must be at most 255"),
        (["Hi", "--prefill-compute", "2"], "error: prefill_compute=2.0: must be between"),
        (["Hi", "--seed", "99999999999999999999999"], "seed=99999999999999999999999: must be from 0 to 4294967295"),
        (["half \udcff"], "prompt: must be Unicode text in UTF-8"),
        (["Hi", "--temperature", "-1"], "temperature=-1.0: must be 0 or more"),
        (["Hi", "--top-p", "0"], "top_p=0.0: must be above 0"),
        ([""], "prompt='': must be at least one token"),
        ([], "prompt: must be given"),
        (["Hi", "there"], "unrecognized arguments: there"),
    ],
)
def test_bad_settings(refused, dial_folder: Path, arguments: list[str], message: str):
    assert message in refused("generate", dial_folder, *arguments)


def test_a_missing_model(refused, tmp_path: Path):
    assert "model=" in refused("generate", tmp_path / "none", "Hi")


def test_an_interrupt_leaves_the_line_and_shows_the_bill_so_far(rheostat, dial_folder: Path, monkeypatch):
    push = Writer.push

    def interrupted(self: Writer, token_id: int, fraction: float) -> None:
        if len(self.token_ids) == 3:
            raise KeyboardInterrupt
        push(self, token_id, fraction)

    monkeypatch.setattr(Writer, "push", interrupted)
    done = rheostat("generate", dial_folder, "Hello", "--max-new-tokens", 9, "--compute", "1.0,0.8")
    assert (done.status, done.err) == (130, "rheostat: interrupted\n")
    assert done.out.count("tokens   5 in") == 1  # the second answer was not begun
    assert "\n\ntokens   5 in" in done.out


PLAIN = "a plain model"


def test_a_draft_writes_the_same_answer_and_says_how_it_went(rheostat, dial_folder: Path, tmp_path: Path):
    arguments = ("generate", dial_folder, "Hello hello hello", "--max-new-tokens", 20, "--json")
    plain = rheostat(*arguments).figures["answers"][0]
    for name, length in (("prompt_lookup", 3), ("low_dial", 3), (PLAIN, 3), ("low_dial", "auto")):
        if name is PLAIN:
            name = tmp_path / "plain"
            rheostat("export", dial_folder, "--compute", 1.0, "--out", name)
        done = rheostat(*arguments, "--draft", name, "--draft-length", length)
        assert done.status == 0, done.err
        answer = done.figures["answers"][0]
        assert answer["token_ids"] == plain["token_ids"]
        assert answer["ffn_fractions"] == plain["ffn_fractions"]
        drafts = answer["bill"]["speculation"]
        assert drafts["rounds"] + drafts["accepted"] == len(plain["token_ids"]) - 1
        assert len(drafts["acceptance_by_place"]) <= (3 if length == 3 else 6)
        assert name != tmp_path / "plain" or drafts["accepted"] == drafts["drafted"]  # the model itself, by its path
        assert f"{drafts['accepted']} of {drafts['drafted']} accepted" in done.out
    assert plain["bill"]["speculation"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--draft", "magic"), "draft='magic': must be one of"),
        (("--draft", "self"), "error: draft='self': must be another drafter: dynamoe has no draft of its own"),
        (("--draft", "prompt_lookup", "--draft-length", 0), "draft_length=0"),
        (
            ("--draft", "prompt_lookup", "--draft-length", 65),
            "draft_length=65: must be an integer from 1 to 64, or auto",
        ),
        (("--draft", "prompt_lookup", "--draft-length", "some"), "draft_length='some'"),
        (("--draft", "no/such/model"), "error: draft='no/such/model'"),
        (("--draft", "prompt_lookup", "--draft-risk", 0), "error: draft_risk=0"),
        (("--draft", "prompt_lookup", "--draft-length=--5"), "draft_length='--5': must be an integer from 1 to 64"),
        (("--draft", "prompt_lookup", "--draft-length", "²"), "draft_length='²': must be an integer from 1 to 64"),
    ],
)
def test_a_bad_draft_names_itself(rheostat, dial_folder: Path, arguments, message):
    done = rheostat("generate", dial_folder, "Hello", *arguments)
    assert done.status == 2
    assert message in done.err
