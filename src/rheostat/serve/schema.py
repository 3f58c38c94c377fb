"""The bodies of requests, as OpenAI's API has them, with `compute` beside.

Unknown fields are let pass, as clients send many; a field that would change the answer and that we cannot honour
is refused rather than ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rheostat.errors import SettingError, bad_setting

Fraction = Annotated[float, Field(gt=0, le=1)]
"""A fraction of the dense model's FLOPs."""

MOST_CHOICES = 128
MOST_STOPS = 16
LONGEST_STOP = 256
MOST_TOP = 20

REFUSED: dict[str, Any] = {
    "tools": None,
    "functions": None,
    "response_format": {"type": "text"},
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "echo": False,
    "suffix": None,
    "audio": None,
    "repetition_penalty": 1,
    "length_penalty": 1,
    "min_p": 0,
    "typical_p": 1,
    "min_tokens": 0,
    "stop_token_ids": [],
    "allowed_token_ids": None,
    "bad_words": [],
    "use_beam_search": False,
    "guided_json": None,
    "guided_regex": None,
    "guided_choice": None,
    "guided_grammar": None,
    "structured_outputs": None,
    "chat_template": None,
    "chat_template_kwargs": {},
    "continue_final_message": False,
    "add_generation_prompt": True,
}
"""Fields that change the answer and that this server does not know -> the value that changes nothing."""


class Body(BaseModel):
    """Of any request."""

    model_config = ConfigDict(extra="allow", str_max_length=None)


class PhaseCompute(BaseModel):
    """The dial for the prompt and for the answer apart."""

    model_config = ConfigDict(extra="forbid")
    prefill: Fraction = 1.0
    decode: Fraction = 1.0


class StreamOptions(Body):
    """What a stream carries besides."""

    include_usage: bool = False


class Generation(Body):
    """What chat and plain completions share."""

    model: str = Field(max_length=256)
    compute: Fraction | PhaseCompute | None = Field(None, description="Fraction of the dense model's FLOPs to spend")
    compute_min: Fraction | None = Field(None, description="How far a busy server may lower the dial")
    hold: bool | None = Field(None, description="Steer the request by what it has spent, to end at `compute`")
    compute_trace: bool = Field(False, description="Stream each token's FFN width by layer too")
    vllm_xargs: dict[str, Any] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] = 0
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    user: str | None = None

    def check_refused(self) -> None:
        """Refuse what we would otherwise silently ignore.

        Raises:
            SettingError: names the field.
        """
        extra = self.model_extra or {}
        for name, neutral in REFUSED.items():
            if (value := extra.get(name)) not in (None, neutral, [], {}):
                raise SettingError(
                    f"{name}: must be left out, this server does not support it (got {repr(value)[:80]})"
                )
        if (best := extra.get("best_of")) not in (None, 1, self.n):
            raise bad_setting("best_of", best, "equal to n, or left out")

    def stops(self) -> tuple[str, ...]:
        """The stop strings.

        Raises:
            SettingError: too many, or one of a length that cannot be.
        """
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(given) > MOST_STOPS or any(not 0 < len(one) <= LONGEST_STOP for one in given):
            raise SettingError(f"stop: must be at most {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters")
        return tuple(given)

    def top_logprobs_wanted(self) -> int | None:
        """How many alternatives to report with each token; None is no probabilities at all."""
        raise NotImplementedError


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "developer", "tool"]
    content: str | list[dict[str, Any]] | None = None

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates take them.

        Raises:
            SettingError: there is something other than text.
        """
        if isinstance(self.content, list):
            parts = []
            for part in self.content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise bad_setting("content", str(part.get("type"))[:40], "text: this server reads nothing else")
                parts.append(part["text"])
            text = "".join(parts)
        else:
            text = self.content or ""
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Generation):
    """Body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None

    def top_logprobs_wanted(self) -> int | None:
        """As the base class has it.

        Raises:
            SettingError: alternatives without probabilities.
        """
        if not self.logprobs:
            if self.top_logprobs:
                raise bad_setting("top_logprobs", self.top_logprobs, "left out unless logprobs is true")
            return None
        return self.top_logprobs or 0


class CompletionRequest(Generation):
    """Body of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None

    def top_logprobs_wanted(self) -> int | None:
        """As the base class has it."""
        return self.logprobs


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The answer to a request that failed."""

    error: ErrorDetail
