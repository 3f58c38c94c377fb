"""From the engine's events to the bodies of answers, as OpenAI's API has them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rheostat.serve.jobs import Bill, RowDone, Token, TokenProbability

Decode = Callable[[int], str]


@dataclass
class Choice:
    """One answer as far as it has come."""

    text: str = ""
    reason: str | None = None
    tokens: list[Token] = field(default_factory=list)


@dataclass
class Shape:
    """How the bodies of one request look; `Chat` and `Plain` below."""

    id: str
    model: str
    decode: Decode
    wants_logprobs: bool = False
    wants_layers: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    kind = "text_completion"
    chunk_kind = "text_completion"

    def head(self, kind: str) -> dict[str, Any]:
        """What every body begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def body(self, choices: Sequence[Choice], bill: Bill) -> dict[str, Any]:
        """A whole answer."""
        found = [self.choice(place, one) for place, one in enumerate(choices)]
        return self.head(self.kind) | {"choices": found, "usage": usage(bill)}

    def chunks_first(self, num_choices: int) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def chunk(self, index: int, token: Token) -> dict[str, Any]:
        """One token of a stream."""
        cost: dict[str, Any] = {"width": round(token.width, 4), "asked": round(token.compute, 4)}
        if self.wants_layers and token.layers is not None:
            cost["layers"] = [round(one, 4) for one in token.layers]
        choice = {"index": index, **self.piece(token.text), "finish_reason": None, "compute": cost}
        if self.wants_logprobs:
            choice["logprobs"] = self.logprobs([token])
        return self.head(self.chunk_kind) | {"choices": [choice]}

    def chunk_last(self, index: int, done: RowDone) -> dict[str, Any]:
        """The end of one answer in a stream."""
        choice = {"index": index, **self.piece(done.text), "finish_reason": done.reason}
        return self.head(self.chunk_kind) | {"choices": [choice]}

    def chunk_usage(self, bill: Bill) -> dict[str, Any]:
        """The end of a stream whose client wants the bill."""
        return self.head(self.chunk_kind) | {"choices": [], "usage": usage(bill)}

    def choice(self, index: int, one: Choice) -> dict[str, Any]:
        """One whole answer."""
        logprobs = self.logprobs(one.tokens) if self.wants_logprobs else None
        return {"index": index, "text": one.text, "finish_reason": one.reason, "logprobs": logprobs}

    def piece(self, text: str) -> dict[str, Any]:
        """A piece of text in a stream."""
        return {"text": text}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """How likely tokens were."""
        offsets, place = [], 0
        for one in tokens:
            offsets.append(place)
            place += len(one.text)
        return {
            "tokens": [self.decode(one.token_id) for one in tokens],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [{self.decode(top.token_id): top.logprob for top in one.top} for one in tokens],
            "text_offset": offsets,
        }


@dataclass
class Plain(Shape):
    """Of `/v1/completions`."""


@dataclass
class Chat(Shape):
    """Of `/v1/chat/completions`."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def choice(self, index: int, one: Choice) -> dict[str, Any]:
        """One whole answer."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": one.text},
            "finish_reason": one.reason,
            "logprobs": self.logprobs(one.tokens) if self.wants_logprobs else None,
        }

    def chunks_first(self, num_choices: int) -> list[dict[str, Any]]:
        """The roles."""
        delta = {"role": "assistant", "content": ""}
        return [
            self.head(self.chunk_kind) | {"choices": [{"index": one, "delta": delta, "finish_reason": None}]}
            for one in range(num_choices)
        ]

    def piece(self, text: str) -> dict[str, Any]:
        """A piece of text in a stream."""
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """How likely tokens were."""
        content = []
        for one in tokens:
            entry = self._entry(TokenProbability(one.token_id, one.logprob or 0.0))
            content.append(entry | {"top_logprobs": [self._entry(top) for top in one.top]})
        return {"content": content, "refusal": None}

    def _entry(self, one: TokenProbability) -> dict[str, Any]:
        text = self.decode(one.token_id)
        known = "\ufffd" not in text  # part of a character: its bytes are not those of the sign that stands for it
        return {"token": text, "logprob": one.logprob, "bytes": list(text.encode()) if known else None}


def usage(bill: Bill) -> dict[str, Any]:
    """Tokens and what they cost."""
    return {
        "prompt_tokens": bill.num_prompt_tokens,
        "completion_tokens": bill.num_new_tokens,
        "total_tokens": bill.num_prompt_tokens + bill.num_new_tokens,
        "compute": bill.to_dict(),
    }


def total(bills: Sequence[Bill]) -> Bill:
    """The bill of a request with several prompts."""
    first = bills[0]
    if len(bills) == 1:
        return first
    flops, dense = sum(one.flops for one in bills), sum(one.dense_flops for one in bills)
    by_width: dict[str, int] = {}
    for one in bills:
        for width, count in one.tokens_by_width.items():
            by_width[width] = by_width.get(width, 0) + count

    def mean(name: str) -> float:
        return float(sum(getattr(one, name) * one.dense_flops for one in bills) / max(1, dense))

    return replace(
        first,
        target=mean("target"),
        is_held=any(one.is_held for one in bills),
        compute=mean("compute"),
        compute_with_context=flops / max(1, dense),
        ffn_fraction=mean("ffn_fraction"),
        flops=flops,
        dense_flops=dense,
        tokens_by_width=by_width,
        num_prompt_tokens=sum(one.num_prompt_tokens for one in bills),
        num_new_tokens=sum(one.num_new_tokens for one in bills),
        num_draft_tokens=sum(one.num_draft_tokens for one in bills),
        num_accepted_tokens=sum(one.num_accepted_tokens for one in bills),
        is_lowered=any(one.is_lowered for one in bills),
        lowest=min(one.lowest for one in bills),
        first_token_seconds=min(one.first_token_seconds for one in bills),
        total_seconds=max(one.total_seconds for one in bills),
    )
