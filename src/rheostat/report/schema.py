"""What `report.json` holds, and the check that it does. `docs/report.md` says the same in words.

A key may be added without a new format; a key that changes its meaning or goes away raises `FORMAT`. Readers ignore
keys that they do not know.
"""

from __future__ import annotations

import json
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from rheostat.errors import SettingError

FORMAT = 1
"""Of the reports that this version writes. Reports from before there was a format count as 0 and are read too."""

FILE = "report.json"

Measured = float | None
"""A figure that came out of a measurement; null where it was not a number JSON can hold."""


class Run(TypedDict):
    """One way to run the model on one text: what it scored and what it spent."""

    label: str
    kind: str
    """`dense`, `dial`, or the name of a baseline at the same mean compute."""
    asked: float
    compute: float
    """FLOPs spent in products with weights, as a fraction of the dense model's."""
    compute_with_context: float
    """The same with attention over the context."""
    ffn_fraction: float
    """Mean FFN width."""
    loss: Measured
    """Mean negative log-likelihood, nats a token."""
    loss_error: Measured
    """Standard error of the loss less the dense model's, over windows (paired)."""
    perplexity: Measured
    ratio: Measured
    """Perplexity divided by the dense model's."""
    ratio_error: Measured
    """Standard error of `ratio`."""
    accuracy: Measured
    """Share of positions whose most likely token is the text's."""
    accuracy_error: NotRequired[Measured]
    """Standard error of the accuracy less the dense model's, over windows (paired)."""
    agreement: Measured
    """Share of positions whose most likely token is the dense model's."""
    agreement_error: NotRequired[Measured]
    """Standard error of `agreement`, over windows."""
    flops_per_token: NotRequired[float]
    """FLOPs spent a token, attention over the window included."""
    bytes_per_token: NotRequired[Measured]
    """Bytes that decoding one token in a batch of one moves after a full window, counted from sizes; null where the
    method cannot tell."""
    num_tokens: int
    """Predicted tokens."""
    seconds: float
    """Of the forward passes; one unrepeated measurement."""
    tokens_per_second: float


class Positions(TypedDict):
    """Mean FFN width by place in the window."""

    starts: list[int]
    """First token of each bin of positions."""
    width: list[list[Measured]]
    """[layer][bin], fractions of the full width."""


class Use(TypedDict):
    """Which experts the tokens of one text took at one setting of the dial."""

    asked: float
    widths: list[float]
    """Width of each expert, as a fraction of the full width."""
    shares: list[list[float]]
    """[layer][expert], shares of the tokens."""
    positions: NotRequired[Positions]


class PassageRow(TypedDict):
    """What each token of a passage cost at one setting of the dial."""

    asked: float
    compute: float
    widths: list[float]
    """Mean FFN width over layers, one entry a token."""


class Passage(TypedDict):
    """The beginning of the first window."""

    tokens: list[str]
    rows: list[PassageRow]


class Text(TypedDict):
    """All runs on one text. They saw the same windows."""

    name: str
    windows: int
    length: int
    """Tokens in a window."""
    digest: NotRequired[str]
    """SHA-256 of the windows' token ids (int64, little-endian): equal digests, equal text and tokenizer."""
    runs: list[Run]
    """The dense model's first."""
    use: NotRequired[list[Use]]
    passage: NotRequired[Passage]


class Spread(TypedDict):
    """A measured quantity."""

    median: float
    low: float
    """Lower quartile."""
    high: float
    """Upper quartile."""


class Drafts(TypedDict):
    """What drafting came to."""

    acceptance: float
    """Accepted tokens / drafted tokens."""
    acceptance_by_place: list[float]
    """The same at each place of a draft."""
    tokens_per_round: float
    """Tokens written for each pass of the model."""
    bytes_per_token: float
    """Read and written for one token of the answer, drafting included."""


class Bench(TypedDict):
    """Speed of one side at one setting of the dial."""

    side: str
    """What was timed: `stock`, `dial`, another engine."""
    compute: Measured
    """As asked; 1 or null for the dense model."""
    ttft_ms: NotRequired[Spread | float | None]
    """Milliseconds to the first token."""
    tpot_ms: NotRequired[Spread | float | None]
    """Milliseconds for each further token."""
    tokens_per_s: NotRequired[Spread | float | None]
    prompt: NotRequired[int]
    """Tokens of the prompt."""
    batch: NotRequired[int]
    drafts: NotRequired[Drafts]
    """Where somebody drafted."""


class Task(TypedDict):
    """Score on one set of questions at one setting of the dial."""

    task: str
    metric: str
    compute: float
    """As asked."""
    score: Measured
    stderr: NotRequired[Measured]
    rows: NotRequired[int]
    """Questions."""
    paired_difference: NotRequired[Measured]
    """Score less the dense model's on the same questions."""
    paired_stderr: NotRequired[Measured]
    mode: NotRequired[str]
    """How it was scored."""
    kind: NotRequired[str]
    """`dense`, `dial`, or the name of a baseline at the same mean compute."""
    is_choice: NotRequired[bool]
    """One of several answers is chosen."""


def kind_of(task: Task) -> str:
    """`dense`, `dial` or a baseline's name; reports from before baselines were scored on tasks do not say."""
    return task.get("kind") or ("dense" if task["compute"] == 1 else "dial")


class Report(TypedDict):
    """The whole."""

    format: int
    model: str
    method: dict[str, Any]
    """`name` and the settings of the method."""
    seed: int
    texts: list[Text]
    provenance: NotRequired[dict[str, Any]]
    """Command, versions, commit, seed, digests, hardware, time."""
    base: NotRequired[dict[str, Any]]
    """The model it was made from: `name`, and `hub_id`, `license`, `language` where they are known."""
    geometry: NotRequired[dict[str, Any]]
    bench: NotRequired[list[Bench]]
    bench_provenance: NotRequired[dict[str, Any]]
    """Where another command than that of `provenance` measured them."""
    tasks: NotRequired[list[Task]]
    tasks_provenance: NotRequired[dict[str, Any]]


def read(path: Path) -> Report:
    """A report from its file.

    Raises:
        SettingError: it cannot be read, or is no report that this version understands.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"report={str(path)!r}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise SettingError(f"report={str(path)!r}: not valid JSON ({error})") from None
    return check(content, str(path))


def check(content: Any, source: str = FILE) -> Report:
    """`content` as a report, its `format` filled in where it has none. Errors name `source` and the key.

    Raises:
        SettingError: a key is missing or holds something else, or the format is newer than this version's.
    """
    try:
        if not isinstance(content, dict):
            raise _Wrong("", content, "an object")
        version = content.get("format", 0)
        if not isinstance(version, int) or isinstance(version, bool) or version < 0:
            raise _Wrong("format", version, f"an integer from 0 to {FORMAT}")
        if version > FORMAT:
            raise _Wrong("format", version, f"at most {FORMAT}: upgrade rheostat to read it")
        content = {"format": version} | content
        _check(content, Report, "")
        _check_sense(content)
    except _Wrong as wrong:
        raise SettingError(f"report={source!r}: {wrong}") from None
    return cast(Report, content)


class _Wrong(Exception):
    """What is wrong with the value at a path."""

    def __init__(self, path: str, value: Any, allowed: str) -> None:
        name = path.removeprefix(".")
        super().__init__(f"{name}={reprlib.repr(value)}: must be {allowed}" if name else f"must be {allowed}")


def _check(value: Any, hint: Any, path: str) -> None:
    if typing.is_typeddict(hint):
        _check_keys(value, hint, path)
        return
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        if not isinstance(value, list):
            raise _Wrong(path, value, "a list")
        for i, one in enumerate(value):
            _check(one, arguments[0], f"{path}[{i}]")
    elif origin in (types.UnionType, typing.Union):
        kinds = [one for one in arguments if one is not type(None)]
        if value is None and len(kinds) < len(arguments):
            return
        fitting = [one for one in kinds if typing.is_typeddict(one) is isinstance(value, dict)]
        _check(value, (fitting or kinds)[0], path)
    elif origin is dict:
        if not isinstance(value, Mapping):
            raise _Wrong(path, value, "an object")
    elif hint in (int, float):
        is_number = isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise _Wrong(path, value, "an integer" if hint is int else "a number")
    elif not isinstance(value, hint):
        raise _Wrong(path, value, {str: "text"}.get(hint, hint.__name__))


def _check_keys(value: Any, kind: Any, path: str) -> None:
    if not isinstance(value, dict):
        raise _Wrong(path, value, "an object")
    # Not `__required_keys__`, which is wrong where annotations are strings, as here.
    for key, hint in typing.get_type_hints(kind, include_extras=True).items():
        is_optional = typing.get_origin(hint) is NotRequired
        if key in value:
            _check(value[key], typing.get_args(hint)[0] if is_optional else hint, f"{path}.{key}")
        elif not is_optional:
            raise _Wrong(f"{path}.{key}", None, "given")


def _check_sense(report: dict[str, Any]) -> None:
    """What the types do not say."""
    if not isinstance(report["method"].get("name"), str):
        raise _Wrong("method.name", report["method"].get("name"), "text")
    if not any(report.get(part) for part in ("texts", "tasks", "bench")):
        raise _Wrong("texts", [], "a list of at least one text, where there are no tasks and no bench")
    for i, text in enumerate(report["texts"]):
        path = f"texts[{i}]"
        if not text["runs"] or text["runs"][0]["kind"] != "dense":
            raise _Wrong(f"{path}.runs", text["runs"][:1], "a list that begins with the dense model's run")
        for j, run in enumerate(text["runs"]):
            if run["ratio"] is not None and run["ratio"] <= 0:
                raise _Wrong(f"{path}.runs[{j}].ratio", run["ratio"], "above 0")
        for j, use in enumerate(text.get("use", [])):
            if not use["shares"] or not use["widths"]:
                raise _Wrong(f"{path}.use[{j}].shares", use["shares"], "about at least one layer and one expert")
            _check_lengths(use["shares"], len(use["widths"]), f"{path}.use[{j}].shares")
            if "positions" in use:
                places = use["positions"]
                if len(places["width"]) != len(use["shares"]) or not places["starts"]:
                    raise _Wrong(f"{path}.use[{j}].positions.width", places["width"], "about the same layers as shares")
                _check_lengths(places["width"], len(places["starts"]), f"{path}.use[{j}].positions.width")
        if "passage" in text:
            rows = [row["widths"] for row in text["passage"]["rows"]]
            if not text["passage"]["tokens"]:
                raise _Wrong(f"{path}.passage.tokens", [], "a list of at least one token")
            _check_lengths(rows, len(text["passage"]["tokens"]), f"{path}.passage.rows.widths")


def _check_lengths(rows: list[list[Any]], length: int, path: str) -> None:
    for i, row in enumerate(rows):
        if len(row) != length:
            raise _Wrong(f"{path}[{i}]", row, f"a list of {length}")
