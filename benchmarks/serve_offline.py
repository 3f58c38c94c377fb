"""The greedy answers that a server has to give, written without one."""

from __future__ import annotations

from typing import Any

from rheostat.commands import load
from rheostat.config import Common
from rheostat.decode import stream
from rheostat.serve.engine import end_ids
from rheostat.spending import spend


class Offline:
    """Answers by prompt and dial; a shorter answer is the beginning of a longer one."""

    def __init__(self, model: str, longest: int, dtype: str = "float32") -> None:
        self.loaded, self.longest = load(model, Common(dtype=dtype)), longest
        self._ends = tuple(end_ids(self.loaded.adapted, self.loaded.tokenizer))
        self._known: dict[tuple[str, float], list[int]] = {}

    def text(self, prompt: str, compute: float, num_tokens: int) -> str:
        """The answer to a chat, of at most so many tokens."""
        key = prompt, compute
        if key not in self._known:
            self._known[key] = self._write(*key)
        return self._decode(self._known[key][:num_tokens])

    def _write(self, prompt: str, compute: float) -> list[int]:
        tokenizer: Any = self.loaded.tokenizer
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with spend(compute, keep_passes=False, hold=True):
            steps = stream(self.loaded.adapted, ids, max_new_tokens=self.longest, eos_token_ids=self._ends)
            return [int(step.token_ids[0]) for step in steps]

    def _decode(self, ids: list[int]) -> str:
        text: str = self.loaded.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
