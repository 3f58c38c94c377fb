"""From text as users have it (files, folders, data sets, strings) to windows of tokens."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from rheostat.errors import SettingError, bad_setting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
"""Files that can be read: plain text is one document, JSON lines are one document a row (field `text`, or the
conversation in `messages`)."""

Message = dict[str, str]
"""One turn of a conversation: `role` and `content`."""

Document = str | list[Message]
"""A text, or a conversation that `pack` writes out with the tokeniser's chat template."""

ROW = "a string in the field `text`, or turns with `role` and `content` in `messages`"

BUILTIN = {"builtin:calibration": "calibration.jsonl.gz", "builtin:heldout": "heldout.jsonl.gz"}
"""Name -> file of the texts that the package carries."""

CHARS_PER_TOKEN = 4
"""Rough, for planning how much to tokenise; nothing depends on its being right."""

BATCH_CHARS = 1_000_000
"""About how many characters go to the tokeniser at once: it needs some hundred bytes for each token."""


def read_texts(data: Any) -> list[Document]:
    """The documents in `data`, in order; blank ones are left out.

    Args:
        data: a path, a built-in text (`builtin:calibration`, `builtin:heldout`), or an iterable of paths,
            strings, or rows with a string in the field `text` or a conversation in `messages`, such as one
            split of a `datasets.DatasetDict`.
            A folder stands for all files in it, at any depth, that end in one of `SUFFIXES`, sorted by path.
            A string alone is a path. Among several, a string is a path if it exists or ends in one of
            `SUFFIXES`, and else a document; a `Path` is always a path.

    Raises:
        SettingError: something in `data` does not exist, cannot be read, is not UTF-8 or has no text; the
            message says where.
    """
    if isinstance(data, str | os.PathLike):
        texts = _read_path(os.fspath(data))
    elif isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise bad_setting("data", type(data).__name__, "paths, strings, or the rows of one split of a data set")
    else:
        texts = [text for index, item in enumerate(data) for text in _read_item(item, index)]
    texts = [text for text in texts if not _is_blank(text)]
    if not texts:
        raise bad_setting("data", _brief(data), "text: it is empty")
    return texts


def pack(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Document],
    *,
    length: int,
    limit: int | None = None,
    seed: int = 0,
    name: str = "data",
) -> torch.LongTensor:
    """Cut documents into windows of `length` tokens, in random order.

    Documents are joined by the tokeniser's end-of-text token, with no other special tokens. With a `limit`,
    only about as much text as it needs is tokenised: pieces of a few windows each, spread evenly over the
    documents, so that each gives the same share of its length (to within a piece).

    Args:
        tokenizer: of the model that will read the windows.
        texts: the documents. A conversation goes through the tokeniser's chat template; where there is none, it is
            written as `role: content`, one turn a paragraph.
        length: tokens in a window, at least 2.
        limit: at most this many windows; None for all.
        seed: of the choice of pieces and the order of windows. The same arguments give the same windows.
        name: what an error calls the texts.

    Returns:
        [N, length] int64, N at least 1.

    Raises:
        SettingError: the texts do not fill one window, `length` or `limit` is out of range, or the tokeniser
            has no end-of-text token.
    """
    if length < 2:
        raise bad_setting("length", length, "at least 2 tokens")
    if limit is not None and limit < 1:
        raise bad_setting("limit", limit, "at least 1 window")
    if tokenizer.eos_token_id is None:
        raise bad_setting("tokenizer", type(tokenizer).__name__, "one with an end-of-text token")
    generator = torch.Generator().manual_seed(seed)
    plain = [text if isinstance(text, str) else _written_out(tokenizer, text) for text in texts]
    if limit is None:
        ids = _join(tokenizer, plain, None)
    else:
        # Some six windows: shorter pieces mean more seams inside windows, longer ones a less even sample.
        pieces = _spread(plain, 6 * CHARS_PER_TOKEN * length, generator)
        ids = _join(tokenizer, pieces, limit * length)
    num_windows = len(ids) // length
    if not num_windows:
        raise bad_setting(name, f"{len(ids)} tokens", f"enough text for one window of {length} tokens")
    windows = torch.tensor(ids[: num_windows * length]).view(num_windows, length)  # [N, length]
    order = torch.randperm(num_windows, generator=generator)[:limit]
    return cast(torch.LongTensor, windows[order])


def _is_blank(text: Document) -> bool:
    return not (text.strip() if isinstance(text, str) else any(turn["content"].strip() for turn in text))


def _written_out(tokenizer: PreTrainedTokenizerBase, turns: list[Message]) -> str:
    """A conversation as one text, special tokens included."""
    if not tokenizer.chat_template:
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    try:
        return cast(str, tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # templates raise errors of their own, about roles they do not know
        raise bad_setting(
            "data", "messages", f"a conversation that the model's chat template takes ({error})"
        ) from error


def _read_item(item: Any, index: int) -> list[Document]:
    """The documents of one element of a list of paths, strings or rows."""
    if isinstance(item, os.PathLike):
        return _read_path(os.fspath(item))
    if isinstance(item, str):
        # `os.path`, because a document is a name too long for `Path.exists`, which then raises.
        is_path = item.startswith("builtin:") or item.endswith(SUFFIXES) or os.path.exists(os.path.expanduser(item))
        return _read_path(item) if is_path else [_checked(item, f"item {index}")]
    document = _row(item, f"item {index}")
    if document is None:
        raise bad_setting("data", f"item {index}", f"a path, a string, or a row with {ROW}")
    return [document]


def _row(row: Any, where: str) -> Document | None:
    """The document in one row of a data set, or None where there is none."""
    if not isinstance(row, Mapping):
        return None
    if isinstance(text := row.get("text"), str):
        return _checked(text, where)
    turns = row.get("messages")
    if not isinstance(turns, list) or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    ):
        return None
    return [{"role": turn["role"], "content": _checked(turn["content"], where)} for turn in turns]


def _read_path(name: str) -> list[Document]:
    if name.startswith("builtin:"):
        if name not in BUILTIN:
            raise bad_setting("data", name, f"one of {', '.join(BUILTIN)}")
        packed = resources.files("rheostat").joinpath("data", BUILTIN[name]).read_bytes()
        return list(_json_lines(_decode(gzip.decompress(packed), name), name))
    path = Path(name).expanduser()
    if os.path.isdir(path):
        files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        if not files:
            raise bad_setting("data", name, f"a folder with files that end in {', '.join(SUFFIXES)}")
        return [text for file in files for text in _read_file(file)]
    if not os.path.isfile(path):
        raise bad_setting("data", _brief(name), "an existing file or folder (to pass a text itself, put it in a list)")
    if not name.endswith(SUFFIXES):
        raise bad_setting("data", name, f"a file that ends in {', '.join(SUFFIXES)}")
    return _read_file(path)


def _read_file(path: Path) -> list[Document]:
    name = str(path)
    try:
        raw = path.read_bytes()
        text = _decode(gzip.decompress(raw) if name.endswith(".gz") else raw, name)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise bad_setting("data", name, f"a complete gzip file ({error})") from error
    except OSError as error:
        raise bad_setting("data", name, f"a file that can be read ({error.strerror})") from error
    texts: list[Document] = [text]
    if name.removesuffix(".gz").endswith(".jsonl"):
        texts = list(_json_lines(text, name))
    if all(_is_blank(text) for text in texts):
        raise bad_setting("data", name, "a file with text: it is empty")
    return texts


def _decode(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        where = "unpacked byte" if name.endswith(".gz") else "byte"
        raise bad_setting("data", name, f"UTF-8 text: {where} {error.start} is not") from error


def _json_lines(text: str, name: str) -> Iterator[Document]:
    # Not `splitlines`: it also cuts at characters that JSON allows inside strings, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _bad_row(name, number) from error
        document = _row(row, f"{name}, line {number}")
        if document is None:
            raise _bad_row(name, number)
        yield document


def _bad_row(name: str, number: int) -> SettingError:
    return bad_setting("data", f"{name}, line {number}", f"a JSON object with {ROW}")


def _checked(text: str, where: str) -> str:
    # JSON and Python strings can hold half of a surrogate pair, which no tokeniser takes.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise bad_setting("data", where, f"valid Unicode: character {error.start} is half of a pair") from error
    return text


def _brief(data: Any) -> str:
    text = data if isinstance(data, str) else str(data)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _spread(texts: Sequence[str], size: int, generator: torch.Generator) -> Iterator[str]:
    """All texts in pieces of about `size` characters, in an order of which every beginning is an even sample.

    The k-th of a text's n pieces (in random order) stands at (k + u) / n, u uniform in [0, 1) for each text.
    So a share f of the order holds f * n pieces of each text, to within one; of many short texts, a random f.
    """
    placed = []
    offsets = torch.rand(len(texts), generator=generator).tolist()
    for index, (text, offset) in enumerate(zip(texts, offsets, strict=True)):
        cuts = _cut(text, size)
        order = torch.randperm(len(cuts), generator=generator).tolist() if len(cuts) > 1 else [0]
        placed += [((k + offset) / len(cuts), index, *cuts[piece]) for k, piece in enumerate(order)]
    for _, index, start, stop in sorted(placed):
        yield texts[index][start:stop]


def _cut(text: str, size: int) -> list[tuple[int, int]]:
    """Consecutive spans of `text`, of about `size` characters, cut before a space where one is near."""
    spans, start = [], 0
    while len(text) - start > size:
        space = text.find(" ", start + size, start + size + 100)
        stop = space if space >= 0 else start + size
        spans.append((start, stop))
        start = stop
    return [*spans, (start, len(text))]


def _join(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], num_needed: int | None) -> list[int]:
    """The tokens of the texts, joined by end-of-text; stops once there are `num_needed` (None: never)."""
    ids: list[int] = []
    rest = iter(texts)
    while num_needed is None or len(ids) < num_needed:
        num_chars = BATCH_CHARS if num_needed is None else CHARS_PER_TOKEN * (num_needed - len(ids))
        batch = _take(rest, min(num_chars, BATCH_CHARS))
        if not batch:
            break
        # Not verbose: documents longer than the model's context are meant here, and not worth a warning.
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for tokens in encoded["input_ids"]:
            if ids:
                ids.append(tokenizer.eos_token_id)
            ids += tokens
    return ids


def _take(texts: Iterator[str], num_chars: int) -> list[str]:
    """The next texts, up to the first that brings them to `num_chars` characters."""
    batch: list[str] = []
    while num_chars > 0 and (text := next(texts, None)) is not None:
        batch.append(text)
        num_chars -= len(text)
    return batch
