from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rheostat import text
from rheostat.errors import SettingError
from rheostat.text import pack, read_texts

EOS = 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that a test can tell the text from the tokens; 256 is end-of-text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate([*alphabet, "<eos>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    # As many tokenisers do, it puts a token at the front of every text, unless told not to.
    backend.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", model_max_length=16)


TOKENIZER = byte_tokenizer()


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"source": "test", "text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def refuse(data: object, *words: str) -> None:
    with pytest.raises(SettingError) as caught:
        read_texts(data)
    message = str(caught.value)
    assert message.startswith("data=")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_every_kind_of_file_is_read(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo".encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("drei é".encode()))
    (tmp_path / "c.jsonl").write_bytes(jsonl("four", " ", "five\u2028six") + b"\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.jsonl.gz").write_bytes(gzip.compress(jsonl("seven")))
    (tmp_path / "readme.md").write_text("not read")
    expected = ["one\ntwo", "drei é", "four", "five\u2028six", "seven"]
    assert read_texts(tmp_path) == expected
    assert read_texts(str(tmp_path)) == expected
    assert read_texts(["eight", str(tmp_path)]) == ["eight", *expected]
    assert read_texts([tmp_path / "c.jsonl", str(tmp_path / "a.txt")]) == [
        "four",
        "five\u2028six",
        "one\ntwo",
    ]


def test_strings_and_rows_are_documents(tmp_path: Path):
    assert read_texts(["one", "", "t w o", "x" * 5000]) == ["one", "t w o", "x" * 5000]
    import datasets

    rows = datasets.Dataset.from_list([{"text": "one", "n": 1}, {"text": "two", "n": 2}])
    assert read_texts(rows) == ["one", "two"]
    assert read_texts(rows["text"]) == ["one", "two"]
    (tmp_path / "a.txt").write_text("from a file")
    assert read_texts(["one", str(tmp_path / "a.txt")]) == ["one", "from a file"]


def test_builtin_texts_come_from_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "heldout.jsonl.gz").write_bytes(gzip.compress(jsonl("packed")))
    monkeypatch.setattr(text.resources, "files", lambda package: {"rheostat": tmp_path}[package])
    assert read_texts("builtin:heldout") == ["packed"]
    assert read_texts(["builtin:heldout", "more"]) == ["packed", "more"]
    refuse("builtin:other", "builtin:calibration", "builtin:heldout")
    refuse(["builtin:other"], "builtin:calibration")


def test_what_does_not_exist_is_refused(tmp_path: Path):
    refuse(tmp_path / "none.txt", "none.txt", "existing")
    refuse(str(tmp_path / "none"), "existing", "list")
    refuse(["text", str(tmp_path / "none.jsonl.gz")], "none.jsonl.gz", "existing")
    refuse([Path("not a document")], "existing")
    refuse("word " * 100, "existing")


def test_what_is_no_text_is_refused(tmp_path: Path):
    (tmp_path / "a.csv").write_text("a,b")
    refuse(tmp_path / "a.csv", "a.csv", ".jsonl.gz")
    refuse(tmp_path, ".jsonl.gz")
    refuse(3, "int")
    refuse([1], "item 0")
    refuse(["one", {"txt": "two"}], "item 1", "`text`")
    refuse([{"text": 3}], "item 0", "`text`")
    import datasets

    refuse(datasets.DatasetDict(train=datasets.Dataset.from_list([{"text": "one"}])), "split")
    refuse([], "empty")
    refuse([" \n"], "empty")
    refuse(["\ud800"], "item 0", "character 0")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b" \n", ["empty"]),
        ("a.jsonl", b"", ["empty"]),
        ("a.txt", b"good\xffbad", ["byte 4"]),
        ("a.txt.gz", gzip.compress(b"good\xffbad", mtime=0), ["unpacked byte 4"]),
        ("a.txt.gz", gzip.compress(b"some text that was cut", mtime=0)[:-9], ["gzip"]),
        ("a.txt.gz", b"plain text", ["gzip"]),
        ("a.jsonl", jsonl("one") + b"{", ["line 2", "JSON"]),
        ("a.jsonl", jsonl("one", "two") + b'\n["three"]', ["line 4", "JSON"]),
        ("a.jsonl", b'{"txt": "one"}', ["line 1", "`text`"]),
        ("a.jsonl", b'{"text": null}', ["line 1", "`text`"]),
        ("a.jsonl", b'{"text": "\\ud800"}', ["line 1", "character 0"]),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path: Path, name: str, content: bytes, words: list[str]):
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name, name, *words)
    refuse(tmp_path, name, *words)


def windows_as_text(windows: torch.Tensor) -> list[str]:
    return ["".join("|" if id == EOS else TOKENIZER.decode([id]) for id in row) for row in windows.tolist()]


def test_windows_are_contiguous_and_all_there():
    texts = ["abcdefg", "hij", "klmnopq"]
    windows = pack(TOKENIZER, texts, length=4)
    assert windows.dtype == torch.int64
    assert sorted(windows_as_text(windows)) == [
        "abcd",
        "efg|",
        "hij|",
        "klmn",
    ]  # "opq" does not fill a window
    assert windows_as_text(windows) != sorted(windows_as_text(windows))


def test_no_warning_for_documents_beyond_the_context(caplog: pytest.LogCaptureFixture, capsys):
    pack(TOKENIZER, ["x" * 100], length=4)  # the tokeniser's model_max_length is 16
    assert not caplog.records
    assert not capsys.readouterr().err


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="ab \n", min_size=1, max_size=300), min_size=1, max_size=6),
    length=st.integers(2, 12),
    limit=st.none() | st.integers(1, 20),
    seed=st.integers(0, 3),
)
def test_pack_keeps_its_promises(texts: list[str], length: int, limit: int | None, seed: int):
    num_tokens = sum(map(len, texts)) + len(texts) - 1  # a byte each, and the seams
    if num_tokens < length:
        with pytest.raises(SettingError, match=f"{num_tokens} tokens.*{length} tokens"):
            pack(TOKENIZER, texts, length=length, limit=limit, seed=seed)
        return
    windows = pack(TOKENIZER, texts, length=length, limit=limit, seed=seed)
    assert windows.shape[1] == length
    if limit is None:
        assert len(windows) == num_tokens // length
    else:  # cutting long documents adds seams, so there may be a window more than without a limit
        assert min(limit, num_tokens // length) <= len(windows) <= limit
    assert torch.equal(windows, pack(TOKENIZER, texts, length=length, limit=limit, seed=seed))
    for window in windows_as_text(windows):
        for part in window.split("|"):
            assert any(part in text for text in texts)


def test_the_seed_decides():
    texts = ["".join(chr(97 + i % 26) for i in range(5000))]
    one, same, other = (pack(TOKENIZER, texts, length=8, limit=9, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_limit_samples_documents_by_their_length():
    texts = ["a" * 40_000, "b" * 20_000, "c" * 20_000, *["d"] * 20]
    windows = pack(TOKENIZER, texts, length=8, limit=1000)
    share = [float((windows == TOKENIZER.encode(letter)[-1]).float().mean()) for letter in "abc"]
    assert share == pytest.approx([0.5, 0.25, 0.25], abs=0.05)


def test_a_limit_does_not_begin_at_the_beginning():
    windows = pack(TOKENIZER, ["a" * 100_000 + "b" * 100_000], length=50, limit=100)
    assert float((windows == TOKENIZER.encode("b")[-1]).float().mean()) == pytest.approx(0.5, abs=0.15)


def test_a_limit_tokenises_no_more_than_it_needs():
    asked = []

    class Counting(PreTrainedTokenizerFast):
        def __call__(self, batch, **options):  # type: ignore[override]
            asked.extend(map(len, batch))
            return super().__call__(batch, **options)

    tokenizer = Counting(tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="<eos>")
    assert len(pack(tokenizer, ["word " * 100_000], length=16, limit=64)) == 64
    assert sum(asked) < 6 * 64 * 16  # planned for four characters a token; here it is one
    asked.clear()
    pack(tokenizer, ["word " * 100] * 300, length=16)
    assert sum(asked) == 150_000


def test_pieces_are_cut_before_spaces():
    text_ = "seven letters " * 50
    spans = text._cut(text_, 40)
    assert "".join(text_[a:b] for a, b in spans) == text_
    assert all(text_[a] == " " for a, _ in spans[1:])
    assert text._cut("x" * 100, 40) == [(0, 40), (40, 80), (80, 100)]


def test_bad_settings_of_pack_are_named():
    with pytest.raises(SettingError, match="length=1: must be at least 2"):
        pack(TOKENIZER, ["text"], length=1)
    with pytest.raises(SettingError, match="limit=0: must be at least 1"):
        pack(TOKENIZER, ["text"], length=2, limit=0)
    with pytest.raises(SettingError, match=r"heldout='4 tokens': .* 5 tokens"):
        pack(TOKENIZER, ["text"], length=5, name="heldout")
    with pytest.raises(SettingError, match="end-of-text"):
        pack(PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer), ["text"], length=2)
