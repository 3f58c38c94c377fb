"""`generate` of `transformers` with the runtime in the model's place.

All preparation is `transformers`' own (generation config, logits processors, stopping criteria, seeds), because it
calls us as its decoding method; only the passes through the model are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.generation import GenerationMode, StoppingCriteriaList, StopStringCriteria

from rheostat.holding import NewAccount
from rheostat.runtime.batch import Batch
from rheostat.runtime.building import Unsupported
from rheostat.runtime.engine import Runtime, Settings
from rheostat.sampling import most_likely
from rheostat.spending import current_spending

SettingsOf = Callable[[str, int], Settings]
"""(phase, rows) -> the native settings that the enclosing `spend` asks for."""

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)

ELSEWHERE = (
    "assistant_model",
    "custom_generate",
    "inputs_embeds",
    "negative_prompt_ids",
    "past_key_values",
    "position_ids",
    "prompt_lookup_num_tokens",
)
"""Arguments that change what the passes do."""

PREPARED = frozenset({"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"})
"""What `transformers` prepares for the model."""


def generate(
    model: Any,
    runtime: Runtime,
    settings: SettingsOf,
    account: NewAccount,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What `model.generate(*args, **kwargs)` returns.

    Raises:
        Unsupported: these arguments are for `transformers`; nothing has happened yet.
    """
    for name in ELSEWHERE:
        if kwargs.get(name) is not None:
            raise Unsupported(f"generate's argument {name}")
    if len(args) > 6:  # inputs, config, processors, criteria, prefix function, synced_gpus; then it is rare
        raise Unsupported("generate's positional arguments")
    kwargs = _with_stop_strings(model, dict(kwargs))
    loop = _Loop(runtime, settings, account, kwargs.pop("streamer", None))
    return model.generate(*args, custom_generate=loop, **kwargs)


def _with_stop_strings(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Stop strings as a criterion: `transformers` does not hand the tokenizer, which they need, to a decoding method
    that is not its own."""
    tokenizer, strings = kwargs.pop("tokenizer", None), kwargs.get("stop_strings")
    if strings is None:
        config = kwargs.get("generation_config") or model.generation_config
        if config.stop_strings is not None:
            raise Unsupported("stop strings in a generation config")
        return kwargs
    if tokenizer is None:
        raise Unsupported("stop strings without a tokenizer")  # `transformers` says so better
    del kwargs["stop_strings"]
    criteria = [*(kwargs.get("stopping_criteria") or ()), StopStringCriteria(tokenizer, strings)]
    return kwargs | {"stopping_criteria": StoppingCriteriaList(criteria)}


class _Loop:
    """The decoding method that `transformers` calls."""

    def __init__(self, runtime: Runtime, settings: SettingsOf, account: NewAccount, streamer: Any) -> None:
        self.runtime, self.settings, self.account, self.streamer = runtime, settings, account, streamer

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Ids [B, T + new]."""
        _check(input_ids, generation_config, model_kwargs)
        if self.runtime.ahead is not None and generation_config.prefill_chunk_size:
            raise Unsupported("prefill_chunk_size, which reads prompts in all layers")
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        num_rows, num_tokens = input_ids.shape
        spending = current_spending()
        batch = Batch.read(
            self.runtime,
            input_ids,
            model_kwargs.get("attention_mask"),
            self.settings("prefill", num_rows),
            num_new=generation_config.max_length - num_tokens,
            account=self.account(num_rows),
        )
        setting = self.runtime.setting(self.settings("decode", num_rows))
        try:
            ids = self._write(batch, setting, input_ids, logits_processor, stopping_criteria, generation_config)
        finally:
            batch.settle()
        assert spending is current_spending()
        if self.streamer is not None:
            self.streamer.end()
        return ids

    def _write(
        self, batch: Batch, setting: torch.Tensor | None, ids: torch.Tensor, processors: Any, criteria: Any, config: Any
    ) -> torch.Tensor:
        has_ends = any(hasattr(one, "eos_token_id") for one in criteria)  # as `transformers` asks
        unfinished = torch.ones(len(ids), dtype=torch.long)
        logits = batch.logits
        while True:
            scores = processors(ids, logits)
            if config.do_sample:
                drawn = torch.multinomial(nn.functional.softmax(scores, dim=-1), num_samples=1).squeeze(1)
            else:
                drawn = most_likely(scores)
            if has_ends:
                drawn = drawn * unfinished + config._pad_token_tensor * (1 - unfinished)
            ids = torch.cat([ids, drawn[:, None]], dim=-1)
            if self.streamer is not None:
                self.streamer.put(drawn)
            unfinished = unfinished & ~criteria(ids, None)
            if not bool(unfinished.any()):
                return ids
            logits = batch.step(drawn, setting)


def _check(input_ids: torch.Tensor, config: Any, model_kwargs: dict[str, Any]) -> None:
    if (mode := config.get_generation_mode()) not in MODES:
        raise Unsupported(f"generation by {mode.value}")
    if config.return_dict_in_generate or not config.use_cache or config.cache_implementation is not None:
        raise Unsupported("what generate is asked to return, or its cache")
    if unknown := [name for name, value in model_kwargs.items() if name not in PREPARED and value is not None]:
        raise Unsupported(f"generate's argument {unknown[0]}")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and (type(cache) is not DynamicCache or cache.get_seq_length()):
        raise Unsupported("a cache of another kind")
    if model_kwargs.get("logits_to_keep", 1) != 1:
        raise Unsupported("generate's argument logits_to_keep")
    mask = model_kwargs.get("attention_mask")
    if input_ids.dim() != 2 or not input_ids.numel():
        raise Unsupported("an empty prompt")
    if mask is not None and (mask.shape != input_ids.shape or not bool(mask[:, -1].all())):
        raise Unsupported("padding on the right")
