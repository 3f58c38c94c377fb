"""An adapted model as a model of lm-eval: every request is answered under the dial.

lm-eval asks for three things, and each is answered in the way that shows what the methods do (`Account.modes`):

    loglikelihood           prefill+score   the context is prefilled, the continuation scored from the cache
    generate_until          generate        prefill, then one step a token
    loglikelihood_rolling   forward         plain text is no answer to a prompt: one forward pass over each window
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rheostat.adapted import Adapted
from rheostat.errors import bad_setting
from rheostat.eval.accounts import Account, Override
from rheostat.eval.answers import answer
from rheostat.eval.batches import Batch, Request, can_choose_rows, in_rows, plan, truncated
from rheostat.eval.scoring import Score, score, score_forward, scores_by_step
from rheostat.eval.tasks.local import require_lm_eval
from rheostat.eval.ways import Way
from rheostat.processes import Ranks
from rheostat.spending import spend

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from transformers import PreTrainedTokenizerBase
else:  # lm-eval is optional and slow to import, so its base class is mixed in by `make_lm`
    TemplateLM = object

BATCH_TOKENS = 2048
"""Padded tokens read together. Larger batches gain little on a CPU; a GPU may take more."""
ANSWER_ROWS = 32
"""Prompts answered together, at most."""
ANSWER_BATCHES = 4
"""Answering holds a cache, but the logits of one position only: room for this many times the tokens."""


class DialLM(TemplateLM):
    """The adapter; `make_lm` makes one. `open(compute)` sets the dial for the requests that follow."""

    def __init__(
        self,
        adapted: Adapted,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = BATCH_TOKENS,
        max_length: int | None = None,
        seed: int = 0,
        ranks: Ranks | None = None,
        progress: Callable[[int, int], None] | None = None,
        hold: bool = True,
    ) -> None:
        """Wrap an adapted model.

        Args:
            batch_tokens: padded tokens read together.
            max_length: tokens that context and continuation may have; left out, what the model reads.
            seed: for tasks that draw their answers.
            ranks: processes to share the batches with; all make the same requests and get all results.
            progress: called with (batches done, batches in all).
            hold: steer each request by what it has spent, so that it ends at what was asked.

        Raises:
            SettingError: a setting is out of range, or the tokenizer is missing or has no end token.
        """
        from lm_eval.models.utils import resolve_max_length

        super().__init__()
        if tokenizer is None:
            raise bad_setting("tokenizer", None, "the model's tokenizer: tasks are text")
        if tokenizer.eos_token_id is None:
            raise bad_setting("tokenizer", type(tokenizer).__name__, "one with an end-of-text token")
        if batch_tokens < 1:
            raise bad_setting("batch_tokens", batch_tokens, "1 or more")
        most = resolve_max_length(adapted.config, tokenizer)
        if max_length is not None and not 2 <= max_length <= most:
            raise bad_setting("max_length", max_length, f"between 2 and {most}, the tokens this model reads")
        self.adapted, self.tokenizer = adapted, tokenizer
        self.batch_tokens, self.max_length, self.seed = batch_tokens, max_length or most, seed
        self.ranks, self.hold = ranks or Ranks(), hold
        self.progress = progress or (lambda done, total: None)
        self.account = Account(1.0)
        pad = tokenizer.pad_token_id
        self._pad_id = int(tokenizer.eos_token_id if pad is None else pad)
        ends = adapted.generation_config.eos_token_id
        self._end_ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def open(self, compute: float, override: Override | None = None) -> None:
        """Answer the requests that follow at `compute`, on a new account."""
        self.account = Account(compute, override)

    def close(self) -> Account:
        """The account, with what all processes spent."""
        mine, self.account = self.account, Account(self.account.compute)
        return mine.over_all(self.ranks)

    # -- tokens, as lm-eval's own adapter for `transformers` counts them

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of prompts with a chat template."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; no second token for the beginning where the text has one."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        # Not verbose: texts longer than the model's context are cut below, and counted.
        return list(self.tokenizer(string, return_attention_mask=False, verbose=False, **options)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text of a prompt."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    # -- the three kinds of request

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether greedy decoding would write it."""
        # lm-eval looks at the first token of a continuation after an empty context, so there has to be one.
        blank = {number for number, request in enumerate(requests) if not request.args[1]}
        found = iter(super().loglikelihood([r for n, r in enumerate(requests) if n not in blank], disable_tqdm=True))
        return [(0.0, True) if number in blank else next(found) for number in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Requests as (texts, context, continuation), the last two in tokens."""
        wanted = [Request(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        is_shared = can_choose_rows(self.adapted.method.make_cache(self.adapted.model))
        mode = "prefill+steps" if scores_by_step(self.adapted.method) else "prefill+score"
        scores = self._scored(wanted, mode, score, is_shared)
        return [(one.log_likelihood, one.is_greedy) for one in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each text, in windows that each predict their own tokens."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append(Request(*map(tuple, make_disjoint_window(pair))))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, one in zip(owners, self._scored(windows, "forward", score_forward, False), strict=True):
            sums[owner] += one.log_likelihood
        self.account.num_requests += len(requests) - len(windows)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The answer to each prompt, up to the first of its stop strings, an end token, or the limit of tokens."""
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):  # one batch has one way of writing
            kinds.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        texts: dict[int, str] = {}
        for numbers in kinds.values():
            settings = dict(requests[numbers[0]].args[1])
            texts |= self._written({number: requests[number].args[0] for number in numbers}, settings)
        return [texts[number] for number in range(len(requests))]

    # -- in batches, under the dial

    def _scored(
        self,
        wanted: Sequence[Request],
        mode: str,
        score_batch: Callable[[Adapted, Sequence[Request], Batch, int], dict[int, Score]],
        is_shared: bool,
    ) -> list[Score]:
        cut = [self._fitted(request) if request.continuation else request for request in wanted]
        scored = {number: Score(0.0, True) for number, request in enumerate(cut) if not request.continuation}
        real = [number for number in range(len(cut)) if number not in scored]
        requests = [cut[number] for number in real]
        batches = plan(requests, is_shared=is_shared, batch_tokens=self.batch_tokens)
        self._count(mode, len(wanted))

        def work(batch: Batch) -> dict[int, Score]:
            return score_batch(self.adapted, requests, batch, self._pad_id)

        scored |= {real[number]: one for number, one in self._run(batches, work).items()}
        return [scored[number] for number in range(len(cut))]

    def _fitted(self, request: Request) -> Request:
        if len(request.continuation) > self.max_length:
            allowed = f"tasks whose answers have at most {self.max_length} tokens: one has {len(request.continuation)}"
            raise bad_setting("tasks", "a continuation", allowed)
        fitted = truncated(request, self.max_length)
        self.account.num_truncated += fitted != request
        return fitted

    def _written(self, prompts: dict[int, str], settings: dict[str, Any]) -> dict[int, str]:
        """The answers to prompts that share one way of writing, by number."""
        way = Way.of(settings, end=self.tokenizer.decode(self.eot_token_id), max_length=self.max_length)
        numbers = list(prompts)
        encoded = [self.tok_encode(prompts[number]) or [self.prefix_token_id] for number in numbers]
        room = self.max_length - way.limit
        self.account.num_truncated += sum(len(one) > room for one in encoded)
        tokens = [tuple(one[-room:]) for one in encoded]
        batch_tokens = ANSWER_BATCHES * self.batch_tokens
        rows = in_rows(tokens, num_more=way.limit, batch_tokens=batch_tokens, max_rows=ANSWER_ROWS)
        self._count("generate", len(numbers))

        def is_done(written: Sequence[int]) -> bool:
            return way.is_done(self.tokenizer.decode(list(written[-way.reach :])))

        def work(batch: list[int]) -> dict[int, tuple[str, bool]]:
            # Of the batch's own, so that what is drawn does not depend on which process draws it.
            generator = torch.Generator(self.adapted.device).manual_seed(self.seed * 1_000_003 + batch[0])
            answers = answer(
                self.adapted,
                [tokens[k] for k in batch],
                max_new_tokens=way.limit,
                end_ids=self._end_ids,
                is_done=is_done,
                pad_id=self._pad_id,
                sampling=way.sampling,
                generator=generator,
            )
            texts = [self.tokenizer.decode(list(one.token_ids), skip_special_tokens=True) for one in answers]
            cut = [way.cut(text) for text in texts]
            return {k: (text, one.is_ended) for k, text, one in zip(batch, cut, answers, strict=True)}

        written = self._run(rows, work)
        self.account.num_unended += sum(not is_ended for _, is_ended in written.values())
        return {numbers[k]: text for k, (text, _) in written.items()}

    def _count(self, mode: str, num_requests: int) -> None:
        self.account.modes.add(mode)
        self.account.num_requests += num_requests

    @torch.inference_mode()
    def _run(self, batches: Sequence[Any], work: Callable[[Any], dict[int, Any]]) -> dict[int, Any]:
        """This process's share of the batches, and then everybody's results.

        Whole batches are shared out, so that a result does not depend on the number of processes.
        """
        done: dict[int, Any] = {}
        mine = self.ranks.share(batches)
        for count, batch in enumerate(mine):
            self.progress(count, len(mine))
            account = self.account
            with spend(account.compute, meter=account.meter, override=account.override, hold=self.hold):
                done |= work(batch)
        self.progress(len(mine), len(mine))
        return {number: one for part in self.ranks.gather(done) for number, one in part.items()}


def make_lm(adapted: Adapted, tokenizer: PreTrainedTokenizerBase, **options: Any) -> DialLM:
    """An adapted model as a model of lm-eval; `options` are those of `DialLM`.

    Raises:
        SettingError: lm-eval is not installed, or a setting is out of range.
    """
    lm: DialLM = _lm_class()(adapted, tokenizer, **options)
    return lm


@functools.cache
def _lm_class() -> Any:
    require_lm_eval()
    from lm_eval.api.model import TemplateLM

    return type("RheostatLM", (DialLM, TemplateLM), {"__doc__": DialLM.__doc__})
