"""The model as speculation uses it, on our own runtime: checks of several tokens a row, and drafts of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from rheostat.meter import Meter
from rheostat.runtime.batch import Batch
from rheostat.runtime.engine import Runtime, Settings
from rheostat.runtime.packing import GROUP
from rheostat.speculate.drafter import Draft, Host, State
from rheostat.spending import Spending, current_spending

SettingsOf = Callable[[str, int], Settings]
"""(phase, rows) -> the native settings that the enclosing `spend` asks for."""

PARTS = {"ffn": "ffn", "attention": "attention", "head": "head"}
"""Place of a draft's weights -> the part that their bytes are billed as."""


class NativeHost(Host):
    """One generation on a `Batch`. Rows that have ended are left out of every pass."""

    batch: Batch

    def __init__(self, runtime: Runtime, settings: SettingsOf) -> None:
        """Nothing is read yet."""
        self.runtime, self._settings_of = runtime, settings
        self._asked: Spending | None = None
        self._setting: torch.Tensor | None = None
        self._is_cheap = False
        self._counts: list[int] = []
        """Tokens of each row in the newest check."""
        self._width = 0
        self._step: NativeStep | None = None

    def read(self, input_ids: torch.Tensor, mask: torch.Tensor, num_new: int) -> torch.Tensor:
        """Read the prompts; padding is left out."""
        settings = self._settings_of("prefill", len(input_ids))
        self.batch = Batch.read(self.runtime, input_ids, mask, settings, num_new=num_new)
        return self.batch.logits

    def check(self, state: State, draft: Draft) -> torch.Tensor:
        """Every row's own draft, no longer than it is."""
        self._width = draft.token_ids.shape[1]
        lengths, active = draft.lengths.tolist(), state.active.tolist()
        self._counts = [(n + 1) * is_active for n, is_active in zip(lengths, active, strict=True)]
        block = torch.cat([state.token_ids[:, -1:], draft.token_ids], 1)  # [B, G + 1]
        if min(self._counts) == block.shape[1]:
            return self._read_all(block.flatten()).view(*block.shape, -1)
        taken = torch.arange(self._width + 1) < torch.tensor(self._counts)[:, None]
        found = self._read_all(block[taken])
        logits = found.new_zeros(*taken.shape, found.shape[1])
        logits[taken] = found
        return logits

    def _read_all(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] after each of the tokens [N] of a check, which is billed."""
        pasts = self.batch.positions.tolist()
        found, experts = self.batch.check(token_ids, self.setting, self._counts)
        if (spending := current_spending()) is not None:
            self.runtime.biller.check(spending.meter, self.batch.tally, pasts, self._counts, experts)
            self._bill_body(spending.meter, 8)
        return found

    def take_back(self, drops: list[int]) -> None:
        """Row by row; then what has grown old moves to the body."""
        unread = [self._width + 1 - count for count in self._counts]  # of those it never read them
        numbers = [max(0, drop - less) for drop, less in zip(drops, unread, strict=True)]
        self.batch.take_back(numbers)
        self.batch.cache.settle()

    def room(self, num_rows: int) -> list[int]:
        """What the cache says."""
        return self.batch.cache.room()

    def stepper(self, state: State) -> NativeStep:
        """One token a row, of those that go on."""
        self._step = NativeStep(self, state.active)
        return self._step

    def forget(self, num_tokens: int) -> None:
        """Of the rows that went on; what reading them cost is billed now."""
        assert self._step is not None
        step = self._step
        self.batch.take_back([num_tokens * count for count in step.counts])
        if (spending := current_spending()) is not None and num_tokens:
            self._bill_draft(spending.meter, step.of_active(self.batch.positions), step.experts, num_tokens)

    @contextmanager
    def cheaply(self) -> Iterator[None]:
        """4-bit weights, and the 4-bit view of a cache in planes."""
        body = self.batch.cache.body
        self._is_cheap = True
        if body is not None:
            body.bits = 4
        try:
            yield
        finally:
            self._is_cheap = False
            if body is not None:
                body.bits = 8

    @property
    def setting(self) -> torch.Tensor | None:
        """What the routers obey [B], as the enclosing `spend` asks."""
        asked = current_spending()
        if asked is not self._asked or asked is None:
            self._setting = self.runtime.setting(self._settings_of("decode", len(self.batch.positions)))
            self._asked = asked
        return self._setting

    # -- bills

    def _bill_body(self, meter: Meter, bits: int, times: int = 1) -> None:
        if self.batch.cache.body is not None:
            meter.add("scores", 0, -times * self.runtime.body_savings(self.batch.cache, bits), 0, 0)

    def _bill_draft(self, meter: Meter, pasts: torch.Tensor, experts: list[torch.Tensor], number: int) -> None:
        before = dict(meter.side_bytes)
        chosen = torch.stack(experts) if experts else None
        self.runtime.biller.steps(meter, self.batch.tally, pasts, chosen, number)
        form = self.runtime.draft_form
        if not self._is_cheap or form is None:
            self._bill_body(meter, 8, number)
            return
        self._bill_body(meter, 4, number)
        itemsize = self.runtime.itemsize
        for place in form.places:
            read = meter.side_bytes.get(PARTS[place], 0) - before.get(PARTS[place], 0)
            meter.add("draft", 0, read * (4 + 32 // GROUP) // (8 * itemsize) - read, 0, 0)


class NativeStep:
    """The model as a draft, on the batch's own cache."""

    def __init__(self, host: NativeHost, active: torch.Tensor) -> None:
        self.host, self.active = host, active
        self.num_read = 0
        self.experts: list[torch.Tensor] = []
        self.counts: list[int] = active.long().tolist()
        self._setting = host.setting

    def of_active(self, one: torch.Tensor) -> torch.Tensor:
        """The rows that go on of [B, ...]."""
        return one if all(self.counts) else one[self.active]

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B] -> logits [B, V]; zeros for rows that have ended."""
        host = self.host
        newest = self.of_active(token_ids)
        found, experts = host.batch.check(newest, self._setting, self.counts, is_draft=host._is_cheap)
        self.num_read += 1
        if experts is not None:
            self.experts.append(experts)
        if len(found) == len(token_ids):
            return found
        return found.new_zeros(len(token_ids), found.shape[1]).index_put((self.active,), found)

    def write(self, token_ids: torch.Tensor, number: int) -> torch.Tensor:
        """Token ids [B] -> the `number` most likely ones after them [B, n], one by one; zeros for rows that have
        ended. One call of native code."""
        host = self.host
        newest = self.of_active(token_ids).contiguous()
        found, experts = host.batch.write(newest, self.counts, self._setting, number, is_draft=host._is_cheap)
        self.num_read += number
        if experts is not None:
            self.experts += experts
        if all(self.counts):
            return found.T
        out = found.new_zeros(len(token_ids), number)
        out[self.active] = found.T
        return out
