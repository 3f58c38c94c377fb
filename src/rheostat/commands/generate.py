"""Write an answer at a chosen compute. Each token is coloured by what it cost; the bill comes at the end.

The colour of a token is the FFN width of the forward pass that chose it, over all layers. Several settings of
the dial answer one after the other.

Example:
  rheostat generate smol-dial "Write one sentence about rivers." --compute 0.7
  rheostat generate smol-dial "Why is the sky blue?" --compute 1.0,0.8,0.6 --temperature 0.7
  rheostat generate smol-dial "Rivers are" --no-chat --prefill-compute 0.6 --decode-compute 0.9
  rheostat generate smol-dial --prompt-file letter.txt
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rheostat import terminal
from rheostat.commands import Loaded, check_computes, check_context, load, load_lean
from rheostat.commands.bills import asked, make_bill, show_bill
from rheostat.commands.prompts import prompt_ids, read_prompt
from rheostat.commands.writer import Writer
from rheostat.config import Common, setting
from rheostat.errors import bad_setting, renamed

if TYPE_CHECKING:
    import torch

    from rheostat.meter import Meter
    from rheostat.runtime.engine import Runtime
    from rheostat.sampling import Sampling
    from rheostat.speculate.drafter import Drafter


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Settings of `rheostat generate`."""

    model: str = setting(help="an adapted model, or a dense one (which has compute 1 only)", flag=False)
    prompt: str | None = setting(
        None, help="what to answer, or to continue; - reads it from standard input", flag=False
    )
    prompt_file: str | None = setting(None, help="read the prompt from this file instead; one line end is left out")
    compute: tuple[float, ...] = setting((1.0,), help="fractions of the dense model's FLOPs, one answer each")
    prefill_compute: float | None = setting(None, help="compute for reading the prompt, where it differs")
    decode_compute: float | None = setting(None, help="compute for writing the answer, where it differs")
    max_new_tokens: int = setting(64, help="tokens to write at most")
    temperature: float = setting(0.0, help="0 takes the most likely token; above, tokens are drawn")
    top_k: int = setting(0, help="draw among the k most likely tokens; 0 is no limit")
    top_p: float = setting(1.0, help="draw among the most likely tokens that together reach this probability")
    runtime: str = setting("auto", help="auto: our own where it can; native: insist on it; stock: transformers")
    weights: str = setting("auto", help="our runtime's weights: fp32, bf16, fp16, int8, int4, mixed; auto: as --dtype")
    hold: bool | None = setting(
        None, help="steer each answer by what it has spent, to end at what was asked (default: where nothing drafts)"
    )
    draft: str | None = setting(
        None,
        help="guess tokens and check them together: self, low_dial, prompt_lookup, streaming_llm, snapkv, or a model",
    )
    draft_length: str | None = setting(
        None,
        help="tokens to guess at a time, at most; auto takes what pays by measured times, none where nothing does "
        "(default: auto, and 4 with a temperature, so that a seed repeats the text)",
    )
    draft_compute: float | None = setting(None, help="compute of the low_dial draft (default: the least)")
    draft_risk: float = setting(1.0, help="stop guessing when the risk of a wrong guess exceeds this")
    chat: bool | None = setting(None, help="put the prompt into the chat template (default: if there is one)")


def run(config: Config) -> dict[str, Any]:
    """Answer at each setting in turn.

    Raises:
        SettingError: a setting is out of range, or the prompt cannot be used.
    """
    from rheostat.sampling import Sampling
    from rheostat.skeleton import Skeleton

    sampling = Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    if config.max_new_tokens < 1:
        raise bad_setting("max_new_tokens", config.max_new_tokens, "1 or more")
    if not config.compute:
        raise bad_setting("compute", config.compute, "at least one number")
    if config.hold and config.draft is not None:
        raise bad_setting("hold", config.hold, "left out with --draft: drafts are checked several tokens at a time")
    prompt = read_prompt(config.prompt, config.prompt_file)
    loaded = _load(config)
    phases = [_by_phase(config, compute) for compute in config.compute]
    for name in ("compute", "prefill_compute", "decode_compute"):
        given = getattr(config, name)
        check_computes(loaded.adapted, given if isinstance(given, tuple) else [] if given is None else [given], name)
    input_ids = prompt_ids(loaded, prompt, config.chat)
    num_tokens = input_ids.shape[1] + config.max_new_tokens
    check_context(loaded.adapted, "max_new_tokens", config.max_new_tokens, num_tokens)

    drafting = _drafting(config, loaded)
    native = loaded.adapted.runtime(config.runtime, config.weights, with_forms=True)
    if native is None and isinstance(loaded.adapted.model, Skeleton):
        loaded = load(config.model, config)
    if drafting is not None and loaded.adapted.draft_host(drafting[0], config.runtime, config.weights) is None:
        native = None
    if native is not None:
        native.prepare(decode=drafting is not None, draft=config.draft == "self")
    runs_on = "transformers" if native is None else f"native {native.format}"
    low = _cheapest_width(loaded)
    coloured = terminal.uses_colour(sys.stdout) and low < 1
    out = terminal.console()
    if coloured:
        print(terminal.legend(low))
    answers = []
    for one in phases:
        if len(phases) > 1:
            out.rule(f"compute {asked(one)}", align="left", style="dim", characters="-")
        writer = Writer(sys.stdout, loaded.tokenizer.decode, low if coloured else None)
        answer = _answer(config, loaded, input_ids, one, sampling, writer, drafting, native)
        out.print()
        is_whole, answer["runtime"] = answer.pop("is_whole"), runs_on
        show_bill(answer)
        if not is_whole:
            raise KeyboardInterrupt
        answers.append(answer)
    figures: dict[str, Any] = {"prompt": prompt, "answers": answers}
    return figures | {"provenance": loaded.origin(config.seed)} if config.json else figures


def _load(config: Config) -> Loaded:
    """Without `transformers` where our own runtime is all that is wanted: then the first token is there sooner."""
    found = None
    if config.runtime != "stock" and config.draft is None:
        found = load_lean(config.model, config)
    return found or load(config.model, config)


# -- the answer


def _answer(
    config: Config,
    loaded: Loaded,
    input_ids: torch.Tensor,
    compute: dict[str, float],
    sampling: Sampling,
    writer: Writer,
    drafting: tuple[Drafter, int | str] | None,
    native: Runtime | None,
) -> dict[str, Any]:
    import torch

    from rheostat.spending import spend

    generator = torch.Generator(input_ids.device).manual_seed(config.seed)
    fractions, seconds, is_whole = [], [], True
    with spend(compute, keep_passes=False, hold=drafting is None if config.hold is None else config.hold) as meter:
        steps = _steps(config, loaded, input_ids, sampling, generator, drafting)
        try:
            while True:
                started = time.perf_counter()  # ours, because the stream's clock goes on while we write
                tokens = next(steps, None)
                if tokens is None:
                    break
                took = (time.perf_counter() - started) / len(tokens)
                for token, fraction in zip(tokens, _newest_fractions(meter, len(tokens)), strict=True):
                    seconds.append(took)
                    fractions.append(fraction)
                    writer.push(token, fraction)
                if native is not None and len(seconds) < config.max_new_tokens:
                    native.prepare()  # once: after the first token is out, and before the clock of the next one
        except KeyboardInterrupt:
            if not writer.token_ids:
                raise
            is_whole = False
    writer.finish()
    return {
        "asked": compute,
        "text": writer.text,
        "token_ids": writer.token_ids,
        "tokens": [loaded.tokenizer.decode([token]) for token in writer.token_ids],
        "ffn_fractions": fractions,
        "bill": make_bill(meter, input_ids.shape[1], seconds),
        "is_whole": is_whole,
    }


def _drafting(config: Config, loaded: Loaded) -> tuple[Drafter, int | str] | None:
    """Who drafts, and how much; None where nobody does.

    Raises:
        SettingError: no such drafter, or one that this model cannot have.
    """
    if config.draft is None:
        return None
    from rheostat.speculate.generating import DRAFT_LENGTH, DRAFTERS, make_drafter
    from rheostat.speculate.pacing import AUTO, Pace

    length = Pace.read(config.draft_length or (AUTO if config.temperature == 0 else str(DRAFT_LENGTH)))
    if config.draft not in DRAFTERS:
        if not _is_model(config.draft):
            raise bad_setting("draft", config.draft, f"one of {', '.join(DRAFTERS)}, or a model")
        return _second_model(config, loaded, config.draft), length
    adapted = loaded.adapted
    with renamed(speculate="draft"):
        made = make_drafter(
            config.draft, adapted.method, adapted.dial.low, compute=config.draft_compute, risk=config.draft_risk
        )
    return made, length


def _is_model(name: str) -> bool:
    from rheostat.checkpoints import BUNDLED

    return name in BUNDLED or "/" in name or os.path.exists(os.path.expanduser(name))


def _second_model(config: Config, loaded: Loaded, source: str) -> Drafter:
    """A smaller model with the same tokens drafts.

    Raises:
        SettingError: it cannot be loaded, is adapted, or has other tokens.
    """
    from rheostat import models
    from rheostat.adapted import Adapted
    from rheostat.speculate.drafter import Stopping
    from rheostat.speculate.second import SecondModel, check_tokenizers

    with renamed(model="draft"):
        model, tokenizer = models.load(source, dtype=config.dtype, device=config.device)
    if isinstance(model, Adapted):
        raise bad_setting("draft", source, "a plain model: export one from this artifact")
    check_tokenizers(loaded.tokenizer, tokenizer)
    with renamed(risk="draft_risk"):
        return SecondModel(model, Stopping(risk=config.draft_risk))


def _steps(
    config: Config,
    loaded: Loaded,
    input_ids: torch.Tensor,
    sampling: Sampling,
    generator: torch.Generator,
    drafting: tuple[Drafter, int | str] | None,
) -> Iterator[list[int]]:
    """The answer's tokens as they come: one at a time, or with a draft several."""
    from rheostat.decode import stream

    adapted, limit, ends = loaded.adapted, config.max_new_tokens, _end_ids(loaded)
    if drafting is None:
        for step in stream(
            adapted,
            input_ids,
            max_new_tokens=limit,
            sampling=sampling,
            eos_token_ids=ends,
            generator=generator,
            runtime=config.runtime,
            weights=config.weights,
        ):
            yield step.token_ids.tolist()
        return
    from rheostat.speculate.loop import Ending, speculate  # here, because a first token does not wait for it

    drafter, length = drafting
    for one in speculate(
        adapted.model,
        adapted.method,
        input_ids,
        drafter=drafter,
        draft_length=length,
        ending=Ending(max_new_tokens=limit, eos_token_ids=ends),
        sampling=sampling,
        generator=generator,
        host=adapted.draft_host(drafter, config.runtime, config.weights),
    ):
        yield one.token_ids[0].tolist()


def _newest_fractions(meter: Meter, number: int) -> list[float]:
    """FFN widths of the positions whose logits chose the `number` tokens just drawn: in a prompt's pass the last, in
    one that checked a draft the first."""
    full, newest = meter.num_layers * meter.ffn_size, meter.passes[-1]
    channels = newest.ffn_channels[0].tolist()
    return [n / full for n in (channels[:number] if newest.phase == "decode" else channels[-number:])]


# -- the request


def _by_phase(config: Config, compute: float) -> dict[str, float]:
    prefill, decode = config.prefill_compute, config.decode_compute
    return {
        "prefill": compute if prefill is None else prefill,
        "decode": compute if decode is None else decode,
    }


def _end_ids(loaded: Loaded) -> tuple[int, ...]:
    configured = loaded.adapted.generation_config.eos_token_id
    ends = set(configured if isinstance(configured, list) else [configured]) | {loaded.tokenizer.eos_token_id}
    return tuple(sorted(end for end in ends if end is not None))


def _cheapest_width(loaded: Loaded) -> float:
    """The FFN width at the floor of `compute`, where the colours begin; 1 for a model without a dial."""
    adapted = loaded.adapted
    geometry = adapted.geometry
    share = 2 * geometry.num_layers * geometry.ffn_weights / geometry.token_flops
    return max(0.0, 1 - (1 - adapted.dial.low) / share)
