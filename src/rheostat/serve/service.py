"""From the body of a request to jobs for the engine: the model's name, the dial, the prompt's tokens, the limits."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rheostat.adapted import Adapted
from rheostat.errors import SettingError, bad_setting, check_text
from rheostat.sampling import Sampling
from rheostat.serve.engine import Engine
from rheostat.serve.jobs import Job
from rheostat.serve.schema import ChatRequest, CompletionRequest, Generation, PhaseCompute

MOST_PROMPTS = 64
"""Prompts in one body."""

PRESETS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Settings offered as models of their own, as far as the dial reaches, for clients that can only pick a model."""


class UnknownModel(Exception):
    """There is no such model here."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a server allows."""

    name: str
    """What the model is called."""
    compute: float = 1.0
    """Where a request does not say."""
    compute_min: float | None = None
    """Likewise: how far the load-adaptive dial may go."""
    hold: bool = True
    """Likewise: steer requests by what they have spent."""
    max_prompt_tokens: int = 4096
    max_new_tokens: int = 2048
    """Of one answer at most."""
    new_tokens: int = 256
    """Of one answer where the request does not say."""
    request_seconds: float = 300.0
    max_body_bytes: int = 1 << 20
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    """Web pages of these origins may call the server (CORS); none by default."""


@dataclass
class Service:
    """A model being served."""

    adapted: Adapted
    tokenizer: Any
    engine: Engine
    rules: Rules
    curves: list[dict[str, Any]] = field(default_factory=list)
    """Quality against compute, for the page."""
    started: int = field(default_factory=lambda: int(time.time()))
    _lock: threading.Lock = field(default_factory=threading.Lock)
    """The tokenizer encodes for one request at a time."""

    @property
    def context(self) -> int:
        """Tokens that the model can read."""
        config = self.adapted.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None) or 1 << 30

    def models(self) -> list[str]:
        """The ids this server answers to; `name@x` works for every x that the dial reaches."""
        reached = [one for one in PRESETS if self.adapted.dial.low <= one < 1]
        return [self.rules.name, *(f"{self.rules.name}@{one:g}" for one in reached)]

    def virtual(self, model: str) -> float | None:
        """The dial that a model id sets, or None where it leaves it open.

        Raises:
            UnknownModel: it is not one of ours.
        """
        name, at, value = model.rpartition("@")
        if model == self.rules.name:
            return None
        if not at or name != self.rules.name:
            raise UnknownModel(model)
        try:
            number = float(value)
        except ValueError:
            raise UnknownModel(model) from None
        return self._reachable("model", number)

    def jobs(self, body: Generation, id: str) -> list[Job]:
        """What a request asks for, one job for each prompt.

        Raises:
            SettingError: something in it is not allowed.
            UnknownModel: it is for another model.
        """
        body.check_refused()
        virtual = self.virtual(body.model)
        prefill, decode = self._compute(body, virtual)
        least = self._compute_min(body, min(prefill, decode))
        prompts = self._prompts(body)
        n, seed = body.n or 1, secrets.randbits(62) if body.seed is None else body.seed
        if n * len(prompts) > 128:
            raise SettingError(f"n: must be at most {128 // len(prompts)} for {len(prompts)} prompts")
        sampling = Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k,
        )
        jobs = [
            Job(
                id=f"{id}-{place}",
                prompt=prompt,
                max_new_tokens=self._new_tokens(body, len(prompt)),
                prefill_compute=prefill,
                compute=decode,
                compute_min=least,
                is_held=self._hold(body),
                sampling=sampling,
                seed=seed + place * n,
                n=n,
                stops=body.stops(),
                num_top=body.top_logprobs_wanted(),
                ignores_end=body.ignore_eos,
                deadline=time.monotonic() + self.rules.request_seconds,
            )
            for place, prompt in enumerate(prompts)
        ]
        for job in jobs:
            self.engine.check(job)
        return jobs

    # -- the dial

    def _compute(self, body: Generation, virtual: float | None) -> tuple[float, float]:
        """For the prompt and for the answer: the body's own field, else `vllm_xargs`, else the model id, else the
        server's default."""
        found: Any = body.compute
        if found is None:
            found = (body.vllm_xargs or {}).get("compute")
        if isinstance(found, PhaseCompute):
            found = {"prefill": found.prefill, "decode": found.decode}
        if found is None:
            found = self.rules.compute if virtual is None else virtual
        if not isinstance(found, Mapping):
            found = {"prefill": found, "decode": found}
        if unknown := set(found) - {"prefill", "decode"}:
            raise bad_setting("compute", sorted(map(str, unknown))[0], "a number, or has the keys prefill and decode")
        prefill, decode = (self._reachable("compute", found.get(phase, 1.0)) for phase in ("prefill", "decode"))
        return prefill, decode

    def _compute_min(self, body: Generation, asked: float) -> float | None:
        found = body.compute_min
        if found is None:
            found = (body.vllm_xargs or {}).get("compute_min")
        if found is None:
            found = self.rules.compute_min
            return None if found is None else min(found, asked)
        return self._number("compute_min", found)

    def _hold(self, body: Generation) -> bool:
        found = body.hold
        if found is None:
            found = (body.vllm_xargs or {}).get("hold")
        if found is None:
            return self.rules.hold
        if not isinstance(found, bool):
            raise bad_setting("hold", str(found)[:40], "true or false")
        return found

    def _reachable(self, name: str, value: Any) -> float:
        number = self._number(name, value)
        self.adapted.dial.native(number)
        return number

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise bad_setting(name, str(value)[:40], "a number in (0, 1]")
        try:
            number = float(value)
        except ValueError:
            raise bad_setting(name, value[:40], "a number in (0, 1]") from None  # type: ignore[index]
        if not 0 < number <= 1:
            raise bad_setting(name, number, "a number in (0, 1]")
        return number

    # -- the prompt

    def _prompts(self, body: Generation) -> list[list[int]]:
        if isinstance(body, ChatRequest):
            return [self._checked(self._chat(body))]
        assert isinstance(body, CompletionRequest)
        given: Any = body.prompt
        many = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        if len(many) > MOST_PROMPTS:
            raise SettingError(f"prompt: must be at most {MOST_PROMPTS} prompts (got {len(many)})")
        return [self._checked(self._encode(one) if isinstance(one, str) else one) for one in many]

    def _chat(self, body: ChatRequest) -> list[int]:
        messages = [message.plain() for message in body.messages]
        for message in messages:
            check_text(message["content"])
        if not self.tokenizer.chat_template:
            raise SettingError("messages: this model has no chat template, use /v1/completions")
        try:
            with self._lock:
                text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
                return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        except SettingError:
            raise
        except Exception as error:  # whatever a template raises: it refuses the order of roles, for one
            raise SettingError(f"messages: the model's chat template refuses them ({str(error)[:200]})") from None

    def _encode(self, text: str) -> list[int]:
        check_text(text)
        with self._lock:
            return list(self.tokenizer(text)["input_ids"])

    def _checked(self, ids: list[int]) -> list[int]:
        most = min(self.rules.max_prompt_tokens, self.context - 1)
        if not ids:
            raise SettingError("prompt: must have at least one token")
        if len(ids) > most:
            raise SettingError(f"prompt of {len(ids)} tokens: must be at most {most} tokens")
        if not all(0 <= id < self.adapted.geometry.vocab_size for id in ids):
            raise SettingError(f"prompt: token ids must be from 0 to {self.adapted.geometry.vocab_size - 1}")
        return ids

    def _new_tokens(self, body: Generation, num_prompt_tokens: int) -> int:
        asked = getattr(body, "max_completion_tokens", None) or body.max_tokens
        most = min(self.rules.max_new_tokens, self.context - num_prompt_tokens)
        if asked is None:
            return min(self.rules.new_tokens, most)
        if asked > most:
            raise bad_setting("max_tokens", asked, f"at most {most} after a prompt of {num_prompt_tokens} tokens")
        return asked
