"""Holding a request to the `compute` it asked for: its own spending steers the setting that its next tokens get.

A dial's table is a mean over text: a hard request spends more at the same setting, an easy one less. Here every row has
an account of the weights it was asked to save and of those it did save, and a setting is looked up in the same table,
for the savings that are still wanted, divided by how well such settings have worked on this row so far.

- A *prompt*, of which only the last token's logits are wanted, is held in parts of `PART` tokens: every few layers
  (`Table.groups`) a part's price is set anew by what the prompt's tokens up to the part's end saved in the layers
  before. So how much a token gets depends on later tokens of its part; nothing that it computes does, and nothing is
  predicted from any of them but the last. Read at once or in pieces of whole parts, it is steered alike.
- A *text whose every token is scored* is held causally: the price of a token depends on what tokens up to itself saved
  in the layers before, as if the text ended there.
- A *step of decoding* has one price in all layers, set by all that the row did before.

All sums are whole numbers of weights, and no row sees another's, so a row in a batch is steered as it is alone. What is
asked may change from pass to pass: what a row owes for a token is what was asked when it was read.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rheostat.dial import Dial
from rheostat.geometry import Geometry

MAX_GROUPS = 15
"""The price of a prompt is set this often: a group of layers is one native call."""
HORIZON = 16
"""Tokens over which a step of decoding makes up for what went before, at least."""
HORIZON_SHARE = 1 / 8
"""And as a share of the tokens so far: a long request is steered more gently."""
PART = 256
"""Tokens of a prompt that have one price."""
PHANTOM = 16
"""Tokens of a scored text that are taken to have spent as expected, before its own count."""
KNOWN = 16
"""Tokens of an answer that are taken to have saved as expected, before its own count."""
PRIOR_SHARE = 0.15
"""Of a pass's savings: as much is taken to have come as expected, so that its first layers do not decide."""
MEMORY = 64
"""Tokens after which what a row's savings tell about its next ones has faded (to 1 / e)."""
PROMPT_MEMORY = 16
"""Tokens that a whole prompt counts for in that: answers are another kind of text."""
RATIOS = (0.3, 3.0)
"""Savings of a row against expectation stay within these."""
LEAST = 1e-3
"""Where a held row's setting begins on the table, in points: above the neutral one, so that its routers always run and
what it pays does not depend on its neighbours."""

Numbers = np.ndarray
"""Of float64."""


class Table:
    """A dial as savings: how many weights a token leaves out in each layer, at each point of the table."""

    def __init__(self, dial: Dial, geometry: Geometry, key: str) -> None:
        """
        Args:
            key: of the one setting that is turned.
        """
        self.dial, self.key = dial, key
        self.layer_weights = geometry.attention_weights + geometry.ffn_weights
        self.num_layers, self.head_weights = geometry.num_layers, geometry.head_weights
        self.settings = np.array(dial.settings[key])
        saved = _savings(dial, geometry, key)
        size = -(-self.num_layers // MAX_GROUPS)
        self.groups = [range(i, min(i + size, self.num_layers)) for i in range(0, self.num_layers, size)]
        self.group_of = {group.start: k for k, group in enumerate(self.groups)}
        self.of_group = np.stack([saved[:, group.start : group.stop].sum(1) for group in self.groups])  # [G, K]
        tails = self.of_group[::-1].cumsum(0)[::-1]
        rise = np.arange(len(self.settings)) * 1e-3  # strictly rising, to be inverted
        self.tails = np.maximum.accumulate(tails, 1) + rise
        """[G, K]: saved by a token from this group of layers on."""
        self.points = np.arange(len(self.settings), dtype=np.float64)
        self._whole = [float(one) for one in self.tails[0]]
        """Of `tails`, all layers: as plain numbers, because a step of decoding has a few rows."""
        self._logs = [math.log(one) for one in self.settings[1:]]
        self.token_weights = self.num_layers * self.layer_weights + self.head_weights

    def place(self, wanted: float) -> float:
        """`find` for one token in all layers."""
        whole = self._whole
        k = min(max(bisect_right(whole, wanted), 1), len(whole) - 1)
        found = k - 1 + (wanted - whole[k - 1]) / (whole[k] - whole[k - 1])
        return min(max(found, LEAST), float(len(whole) - 1))

    def value(self, place: float) -> float:
        """`setting` at one place."""
        if place < 1:
            return place * float(self.settings[1])
        k = min(int(place), len(self._logs) - 1)
        return math.exp(self._logs[k - 1] + (place - k) * (self._logs[k] - self._logs[k - 1]))

    def saving(self, place: float) -> float:
        """Weights that a token is expected to save there, in all layers."""
        k = min(int(place), len(self._whole) - 2)
        return self._whole[k] + (place - k) * (self._whole[k + 1] - self._whole[k])

    def native(self, compute: float) -> float:
        """The setting that the dial has there."""
        return self.dial.native(compute)[self.key]

    def find(self, group: int, wanted: Numbers) -> Numbers:
        """The places on the table at which a token saves `wanted` weights from a group on, within the table's range."""
        return np.clip(np.interp(wanted, self.tails[group], self.points), LEAST, self.points[-1])

    def setting(self, places: Numbers) -> Numbers:
        """The native settings there: as `Dial.native` interpolates."""
        logs = np.log(self.settings[1:])
        upper = np.exp(np.interp(places, self.points[1:], logs))
        return np.where(places < 1, places * self.settings[1], upper)

    def expected(self, group: int, places: Numbers) -> Numbers:
        """Weights that a token is expected to save in one group of layers."""
        return np.interp(places, self.points, self.of_group[group])

    def weights(self, num_tokens: Numbers, num_logits: Numbers) -> Numbers:
        """What the dense model multiplies."""
        return num_tokens * (self.num_layers * self.layer_weights) + num_logits * self.head_weights


def _savings(dial: Dial, geometry: Geometry, key: str) -> Numbers:
    """[K, L]. Without a measured profile every layer is taken to save alike."""
    total = (1 - np.array(dial.compute)) * geometry.token_flops / 2  # [K]
    if (profile := dial.profile.get(key)) is None:
        return np.repeat(total[:, None] / geometry.num_layers, geometry.num_layers, 1)
    ffn = (1 - np.array(profile)) * geometry.ffn_weights
    return ffn - (ffn.sum(1) - total)[:, None] / geometry.num_layers  # less what choosing costs


@dataclass(frozen=True)
class Begun:
    """The parts of a prompt that were read, of which more will come. [G + 1] before each group of layers, and after
    all: what they saved, and what was expected."""

    saved: Numbers
    expected: Numbers
    tokens: float
    logits: float

    @classmethod
    def new(cls, num_groups: int) -> Begun:
        """Nothing was read."""
        return cls(np.zeros(num_groups + 1), np.zeros(num_groups + 1), 0.0, 0.0)


@dataclass(slots=True)
class Past:
    """What one row was asked to save and what it saved, from one pass of its request to the next."""

    balance: float = 0.0
    """Weights saved beyond what was asked."""
    saved: float = 0.0
    """Fading: weights saved by the row's tokens."""
    expected: float = 0.0
    """Fading: what was expected of the settings they had."""
    tokens: float = 0.0
    """Tokens so far."""
    prompt: Begun | None = None
    """What was read of a prompt that is not whole."""

    def book(self, owed: float, saved: float, expected: float, num_tokens: float) -> None:
        """A pass is over."""
        fade = math.exp(-num_tokens / MEMORY)
        share = min(1.0, PROMPT_MEMORY / max(num_tokens, 1))
        self.saved, self.expected = self.saved * fade + saved * share, self.expected * fade + expected * share
        self.balance += saved - owed
        self.tokens += num_tokens


@dataclass(frozen=True)
class Account:
    """Of the rows of a batch."""

    table: Table
    rows: Sequence[Past | None]
    """[B]; None is a row that is not held: the dial's table has its settings."""

    @classmethod
    def new(cls, table: Table, num_rows: int) -> Account:
        """Of rows that have done nothing yet, all held."""
        return cls(table, [Past() for _ in range(num_rows)])

    def choose(self, rows: Sequence[int]) -> Account:
        """Of other rows, each of which goes on, on its own, from what the one of these that it names has done."""
        pasts = [self.rows[row] for row in rows]
        return Account(self.table, [None if past is None else replace(past) for past in pasts])

    def copy(self) -> Account:
        """The same so far, and on its own from now on."""
        return self.choose(range(len(self.rows)))

    def skip(self, counts: Sequence[float]) -> None:
        """A pass at full compute over `counts` [B] tokens of the rows: nothing to steer."""
        for past, count in zip(self.rows, counts, strict=True):
            if past is not None:
                past.book(0.0, 0.0, 0.0, count)

    def step(self, asked: Sequence[float]) -> Step:
        """The next token of each row, at the `compute` [B] asked for; 1 is dense."""
        return Step(self, asked)

    def prompt(self, asked: Sequence[float], parts: Parts, *, is_last: bool = True) -> Reading:
        """Prompts, or pieces of them: the last one gives logits."""
        num_logits = np.zeros(parts.counts.shape)
        num_logits[:, -1] = is_last
        return Reading(self, asked, parts, num_logits, 0.0, is_last=is_last)

    def text(self, asked: Sequence[float], counts: Numbers) -> Reading:
        """Texts of which every token is scored, [B, T] of them 1 and padding 0: each is a part."""
        places = np.arange(counts.shape[1])[None].repeat(len(counts), 0)
        return Reading(self, asked, Parts(counts, places), counts, PHANTOM if counts.shape[1] > 1 else 0.0)


NewAccount = Callable[[int], Account | None]
"""For a number of rows: what holds them to what they asked for, if anything does."""


class Step:
    """A step of decoding. Plain numbers: arrays of a few rows cost more than the sums."""

    def __init__(self, account: Account, asked: Sequence[float]) -> None:
        self.account, self.asked = account, asked
        self.values = [0.0] * len(asked)
        """[B], native settings of all layers."""
        self._expected = [0.0] * len(asked)
        self._saved = np.zeros(len(asked))
        table = account.table
        for row, (past, compute) in enumerate(zip(account.rows, asked, strict=True)):
            if compute == 1:
                continue
            if past is None:
                self.values[row] = table.native(compute)
                continue
            place = table.place(_wanted(past, (1 - compute) * table.token_weights))
            self.values[row], self._expected[row] = table.value(place), table.saving(place)

    def setting(self, layer: int) -> Numbers:
        """The native settings [B] of a layer."""
        return np.array(self.values)

    def took(self, layer: int, saved: Numbers) -> None:
        """The tokens [B, 1] of the rows saved so many weights in a layer."""
        self._saved += saved[:, 0]
        if layer == self.account.table.num_layers - 1:
            self.close(self._saved.tolist())

    def close(self, saved: Sequence[float]) -> None:
        """In all layers the rows saved so many weights [B]; rows at full compute need not say."""
        weights = self.account.table.token_weights
        for row, (past, compute) in enumerate(zip(self.account.rows, self.asked, strict=True)):
            if past is not None:
                found = saved[row] if compute < 1 else 0.0
                past.book((1 - compute) * weights, found, self._expected[row], 1)


def _wanted(past: Past, owed: float) -> float:
    """What the row's next token has to be expected to save, where `owed` was asked of it."""
    prior = KNOWN * owed + 1
    ratio = min(max((past.saved + prior) / (past.expected + prior), RATIOS[0]), RATIOS[1])
    return (owed - past.balance / max(HORIZON, past.tokens * HORIZON_SHARE)) / ratio


@dataclass(frozen=True)
class Parts:
    """How the tokens of a pass are divided."""

    counts: Numbers
    """[B, C], tokens in each part of each row."""
    places: np.ndarray
    """[B, T], the part that each token is in; padding may be in any."""

    @classmethod
    def of(cls, valid: np.ndarray, pasts: Sequence[int]) -> Parts:
        """Of prompts whose tokens stand at `valid` [B, T], each after so many."""
        firsts = np.array(pasts)[:, None]
        places = ((firsts + valid.cumsum(1) - 1).clip(min=0) // PART) - firsts // PART
        places = places.clip(min=0)
        return cls(_summed(valid.astype(np.float64), places, int(places.max(initial=0)) + 1), places)

    def sums(self, numbers: np.ndarray) -> Numbers:
        """[B, C], of numbers [B, T]."""
        if self.counts.shape[1] == 1:
            return numbers.sum(1, keepdims=True).astype(np.float64)
        return _summed(numbers, self.places, self.counts.shape[1])


def _summed(numbers: np.ndarray, places: np.ndarray, num_parts: int) -> Numbers:
    rows = np.arange(len(places))[:, None] * num_parts
    flat = np.bincount((rows + places).ravel(), numbers.ravel(), len(places) * num_parts)
    return flat.reshape(len(places), num_parts)


class Reading:
    """A pass over several tokens of each row."""

    def __init__(
        self,
        account: Account,
        given: Sequence[float],
        parts: Parts,
        num_logits: Numbers,
        num_phantoms: float,
        *,
        is_last: bool = True,
    ) -> None:
        self.account, self.parts, self._is_last, self._extra = account, parts, is_last, num_phantoms
        table, asked, pasts = account.table, np.array(given), [past or Past() for past in account.rows]
        is_held = np.array([past is not None for past in account.rows]) & (asked < 1)
        self._held, self._balance = is_held[:, None], np.array([[past.balance] for past in pasts])
        self._free = np.array([[_free(table, *pair)] for pair in zip(account.rows, given, strict=True)])
        begun = [past.prompt or Begun.new(len(table.groups)) for past in pasts]
        self._before = np.array([[one.saved, one.expected] for one in begun])  # [B, 2, G + 1]
        self._after = self._before.copy()
        self.totals = _running(np.array([one.tokens for one in begun]), parts.counts)
        self.logits = _running(np.array([one.logits for one in begun]), num_logits)
        self.owed = (1 - asked)[:, None] * table.weights(self.totals, self.logits)
        typical = (1 - asked)[:, None] * table.weights(np.ones(1), np.ones(1))  # [B, 1], a token's
        self._phantom = table.find(0, typical)  # the places where phantoms are
        self._sums = np.zeros((2, *parts.counts.shape))
        """[2, B, C], saved and expected by each part in the layers so far."""
        prior = PRIOR_SHARE * (self.totals + self._extra) * typical + 1
        known = np.array([[[past.saved], [past.expected]] for past in pasts])
        self._known = (prior + known[:, 0], prior + known[:, 1])
        self._values = np.zeros(parts.counts.shape)

    def setting(self, layer: int) -> Numbers:
        """The native settings of a layer: [B], or [B, T] where tokens of a row have several."""
        values = self.by_part(layer)
        return values[:, 0] if values.shape[1] == 1 else np.take_along_axis(values, self.parts.places, 1)

    def by_part(self, layer: int) -> Numbers:
        """The same [B, C]."""
        if (group := self.account.table.group_of.get(layer)) is not None:
            self._values = self._steer(group)
        return self._values

    def _so_far(self, group: int) -> tuple[Numbers, Numbers]:
        """What all parts up to each saved in the layers before a group, and what was expected: [B, C]."""
        saved, expected = (_running(self._before[:, k, group], self._sums[k]) for k in (0, 1))
        self._after[:, 0, group], self._after[:, 1, group] = saved[:, -1], expected[:, -1]
        return saved, expected

    def _steer(self, group: int) -> Numbers:
        table = self.account.table
        saved, expected = self._so_far(group)
        mine, theirs = self._known
        ratio = ((saved + mine) / (expected + theirs)).clip(*RATIOS)
        number = self.totals + self._extra
        wanted = self.owed - self._balance - saved
        wanted = wanted + self._extra * np.interp(self._phantom, table.points, table.tails[group])
        places = table.find(group, wanted / np.maximum(number, 1) / ratio)
        self._sums[1] += np.where(self._held, self.parts.counts * table.expected(group, places), 0)
        return np.where(self._held, table.setting(places), self._free)

    def took(self, layer: int, saved: Numbers) -> None:
        """The tokens [B, T] of the rows saved so many weights in a layer."""
        self.took_parts(layer, self.parts.sums(saved))

    def took_parts(self, layer: int, saved: Numbers) -> None:
        """The parts [B, C] did."""
        self._sums[0] += np.where(self._held, saved, 0)
        if layer == self.account.table.num_layers - 1:
            self._close()

    def _close(self) -> None:
        """The pass is over."""
        saved, expected = self._so_far(len(self.account.table.groups))
        for row, past in enumerate(self.account.rows):
            if past is None:
                continue
            if self._is_last:
                ends = (float(one[row, -1]) for one in (self.owed, saved, expected, self.totals))
                past.prompt = None
                past.book(*ends)
            else:
                tokens, logits = float(self.totals[row, -1]), float(self.logits[row, -1])
                saved_by, expected_by = self._after[row].copy()
                past.prompt = Begun(saved_by, expected_by, tokens, logits)


def _free(table: Table, past: Past | None, compute: float) -> float:
    """The setting of a row that is not held, or is not to save anything."""
    return table.native(compute) if past is None and compute < 1 else 0.0


def _running(start: Numbers, numbers: Numbers) -> Numbers:
    """[B, C], sums of numbers [B, C] up to each and itself, from `start` [B] on: in this order, however many
    passes the parts came in."""
    return np.concatenate([start[:, None], numbers], 1).cumsum(1)[:, 1:]
