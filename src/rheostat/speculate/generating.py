"""`Adapted.generate(..., speculate=NAME)`: the loop behind the host's own arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rheostat.errors import SettingError, bad_setting, renamed
from rheostat.methods.base import Method
from rheostat.sampling import Sampling
from rheostat.speculate.drafter import Drafter, Host, Stopping
from rheostat.speculate.drafting import LowDial
from rheostat.speculate.lookup import PromptLookup
from rheostat.speculate.loop import Ending, speculate
from rheostat.speculate.sparse import SnapKV, StreamingLLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DRAFT_LENGTH = 4
"""Tokens drafted a round, unless asked otherwise."""

UNKNOWN: dict[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0.0,
    "repetition_penalty": 1.0,
    "return_dict_in_generate": False,
    "sequence_bias": None,
    "suppress_tokens": None,
    "token_healing": False,
    "watermarking_config": None,
}
"""Generation settings of the host that would change the answer and that the loop cannot follow, with the value that
changes nothing (None does not, either)."""

UNKNOWN_DRAWING: dict[str, Any] = {
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_p": 0.0,
    "top_h": None,
    "typical_p": 1.0,
}
"""The same, of those that matter where tokens are drawn."""


@dataclass(frozen=True)
class Asked:
    """What a drafter may be made of."""

    method: Method
    low: float
    """The least `compute` that the dial reaches."""
    compute: float | None
    """Of the draft, where given."""
    stopping: Stopping


def _own(asked: Asked) -> Drafter:
    drafter = asked.method.drafter(asked.stopping)
    if drafter is None:
        raise bad_setting("speculate", "self", f"another drafter: {asked.method.name} has no draft of its own")
    return drafter


def _low_dial(asked: Asked) -> Drafter:
    compute = asked.low if asked.compute is None else asked.compute
    if compute >= 1:
        raise bad_setting("speculate", "low_dial", "another drafter: this model's dial reaches no less than 1")
    if compute < asked.low:
        raise bad_setting("draft_compute", compute, f"between {asked.low:.3f} and 1")
    return LowDial(compute, asked.stopping)


DRAFTERS: dict[str, Callable[[Asked], Drafter]] = {
    "self": _own,
    "low_dial": _low_dial,
    "prompt_lookup": lambda asked: PromptLookup(),
    "streaming_llm": lambda asked: StreamingLLM(stopping=asked.stopping),
    "snapkv": lambda asked: SnapKV(stopping=asked.stopping),
}
"""Drafters by name. A second model is given as a `SecondModel`."""


def make_drafter(
    asked: str | Drafter, method: Method, low: float, *, compute: float | None = None, risk: float = 1.0
) -> Drafter:
    """A drafter by name, or the one given.

    Raises:
        SettingError: no such drafter, or this model cannot have it.
    """
    if isinstance(asked, Drafter):
        return asked
    if asked not in DRAFTERS:
        raise bad_setting("speculate", asked, f"one of {', '.join(DRAFTERS)}, or a drafter")
    with renamed(risk="draft_risk"):
        stopping = Stopping(risk=risk)
    return DRAFTERS[asked](Asked(method, low, compute, stopping))


def generate(
    model: PreTrainedModel,
    method: Method,
    drafter: Drafter,
    input_ids: torch.Tensor | None = None,
    *,
    draft_length: int | str = DRAFT_LENGTH,
    generator: torch.Generator | None = None,
    host: Host | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The prompts [B, T] and what follows them, as the host's `generate` returns it: padded on the right.

    Takes of the host's arguments: attention_mask, max_new_tokens, do_sample, temperature, top_k, top_p, eos_token_id,
    pad_token_id, stop_strings with tokenizer, streamer, past_key_values. What is left out comes from the model's
    generation settings.

    Raises:
        SettingError: for another argument, for values that cannot be used, and for generation settings of the model
            that the loop cannot follow.
    """
    if input_ids is None:
        raise bad_setting("input_ids", None, "given")
    settings = model.generation_config
    mask, streamer = kwargs.pop("attention_mask", None), kwargs.pop("streamer", None)
    ending, cache = _ending(settings, input_ids, kwargs), kwargs.pop("past_key_values", None)
    _refuse_unknown(settings, kwargs)
    sampling, filler = _sampling(settings, kwargs), _filler(settings, ending, kwargs)
    if kwargs:
        name = sorted(kwargs)[0]
        raise SettingError(f"{name}: has no meaning with speculate; leave one of them out")
    rows: list[list[int]] = [[] for _ in input_ids]
    if streamer is not None:
        streamer.put(input_ids.cpu())
    for one in speculate(
        model,
        method,
        input_ids,
        mask,
        drafter=drafter,
        draft_length=draft_length,
        ending=ending,
        sampling=sampling,
        generator=generator,
        cache=cache,
        host=host,
    ):
        for row, new in zip(rows, one.token_ids, strict=True):
            row += new.tolist()
        if streamer is not None:
            for token in one.token_ids[0]:
                streamer.put(token[None].cpu())
    if streamer is not None:
        streamer.end()
    longest = max(map(len, rows))
    new = torch.tensor([row + [filler] * (longest - len(row)) for row in rows], device=input_ids.device)
    return torch.cat([input_ids, new], 1)


def _ending(settings: Any, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> Ending:
    limit = kwargs.pop("max_new_tokens", None) or settings.max_new_tokens
    if limit is None:
        limit = max(1, (settings.max_length or 20) - input_ids.shape[1])
    ends = kwargs.pop("eos_token_id", settings.eos_token_id)
    ends = ends if isinstance(ends, list | tuple) else [] if ends is None else [ends]
    stops, tokenizer = kwargs.pop("stop_strings", None), kwargs.pop("tokenizer", None)
    stops = (settings.stop_strings if stops is None else stops) or ()
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    decode = None if tokenizer is None else tokenizer.decode
    return Ending(max_new_tokens=limit, eos_token_ids=tuple(ends), stop_strings=stops, decode=decode)


def _refuse_unknown(settings: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what the model's generation settings ask for and the loop would drop without a word. An argument with the
    value that changes nothing overrules them, and is taken out."""
    is_drawn = settings.do_sample if kwargs.get("do_sample") is None else kwargs["do_sample"]
    for name, plain in (UNKNOWN | UNKNOWN_DRAWING).items():
        asked = getattr(settings, name, None)
        if name in kwargs:
            if kwargs[name] in (None, plain):
                del kwargs[name]
        elif asked not in (None, plain) and (is_drawn or name in UNKNOWN):
            raise bad_setting(
                f"generation_config.{name}",
                asked,
                f"{plain} with speculate, which cannot follow it; {name}={plain} as an argument goes on without",
            )


def _sampling(settings: Any, kwargs: dict[str, Any]) -> Sampling:
    given = {name: kwargs.pop(name, None) for name in ("do_sample", "temperature", "top_k", "top_p")}
    asked = {name: getattr(settings, name) if value is None else value for name, value in given.items()}
    if not asked["do_sample"]:
        return Sampling()
    plain: dict[str, Any] = {
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }  # what the host's own `generate` falls back to
    return Sampling(**{name: asked[name] if asked[name] is not None else value for name, value in plain.items()})


def _filler(settings: Any, ending: Ending, kwargs: dict[str, Any]) -> int:
    asked = kwargs.pop("pad_token_id", None)
    known = [asked, settings.pad_token_id, *ending.eos_token_ids, 0]
    return int(next(one for one in known if one is not None))
