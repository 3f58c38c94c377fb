"""How a task wants its answers written: stop strings, a limit of tokens, and how a token is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rheostat.errors import bad_setting
from rheostat.sampling import Sampling

MAX_NEW_TOKENS = 256
"""Where a task does not say; as lm-eval has it."""

SAMPLING_KEYS = ("do_sample", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class Way:
    """One way of writing, shared by all prompts of a batch."""

    until: tuple[str, ...]
    """Stop strings; an answer ends before the first of them."""
    limit: int
    """Tokens that an answer may have."""
    sampling: Sampling

    @classmethod
    def of(cls, settings: Mapping[str, Any], *, end: str, max_length: int) -> Way:
        """What a task's `generation_kwargs` say.

        Args:
            end: the text of the end token, which is a stop string too.
            max_length: tokens that the model reads.

        Raises:
            SettingError: a setting is not known, or the model cannot write so much.
        """
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), MAX_NEW_TOKENS))
        until = handle_stop_sequences(list(options.pop("until")), eos=end)
        limit = int(options.pop("max_gen_toks"))
        sampling = _sampling(options)
        if not 1 <= limit < max_length:
            raise bad_setting("max_gen_toks", limit, f"between 1 and {max_length - 1}: the model reads no more")
        return cls(tuple(until), limit, sampling)

    @property
    def reach(self) -> int:
        """Tokens at the end of an answer that may hold the beginning of a stop string: a token is at least one byte, so
        none reaches further back; the rest is for split characters."""
        return max((len(stop.encode()) for stop in self.until), default=0) + 8

    def is_done(self, tail: str) -> bool:
        """Whether an answer that ends so has reached a stop string."""
        return any(stop in tail for stop in self.until if stop)

    def cut(self, text: str) -> str:
        """An answer without its stop string and what follows."""
        from lm_eval.models.utils import postprocess_generated_text

        return str(postprocess_generated_text(text, list(self.until), None))


def _sampling(options: dict[str, Any]) -> Sampling:
    """What is left of a task's settings for generation, as how to draw a token."""
    for key in options:
        if key not in SAMPLING_KEYS:
            raise bad_setting(
                f"generation_kwargs.{key}", options[key], f"left out; there are {', '.join(SAMPLING_KEYS)}"
            )
    if not options.get("do_sample"):
        return Sampling()
    temperature = float(options.get("temperature") or 1.0)
    return Sampling(
        temperature=temperature, top_k=int(options.get("top_k") or 0), top_p=float(options.get("top_p") or 1.0)
    )
