"""A job and what the worker knows of it, down to the bill."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from rheostat.meter import Meter
from rheostat.serve.backend import Row
from rheostat.serve.jobs import Bill, Job, Sink
from rheostat.serve.scheduler import Ticket
from rheostat.serve.writing import Writer


@dataclass(eq=False)
class Line:
    """One row of a job."""

    row: Row
    place: int
    writer: Writer
    generator: torch.Generator
    is_done: bool = False
    newest: int = 0
    compute: float = 1.0
    """Of the pass whose logits are at hand."""


@dataclass
class Mean:
    """Of numbers with weights."""

    total: float = 0.0
    weights: int = 0

    def add(self, number: float, weights: int) -> None:
        """One more."""
        self.total += number * weights
        self.weights += weights

    def value(self, none: float) -> float:
        """The mean; `none` of none."""
        return self.total / self.weights if self.weights else none


@dataclass(eq=False)
class Running:
    """A job from its arrival to its end. Times are on the monotonic clock; 0 is not yet."""

    job: Job
    sink: Sink
    arrived: float
    meter: Meter = field(default_factory=lambda: Meter(keep_passes=False))
    lines: list[Line] = field(default_factory=list)
    joined: float = 0.0
    """When its prompt was begun."""
    read: float = 0.0
    """When its prompt was read to the end."""
    first: float = 0.0
    newest: float = 0.0
    """When its first and its newest token were drawn."""
    lowest: float = 1.0
    is_lowered: bool = False
    is_held: bool = False
    target: Mean = field(default_factory=Mean)
    """Of what its passes were run at."""

    @property
    def open_lines(self) -> list[Line]:
        """Rows that are still being written, or read."""
        return [line for line in self.lines if not line.is_done]

    def note_compute(self, found: float, asked: float, weights: int) -> None:
        """A pass is run at `found` where `asked` was asked for; the dense model would multiply so many weights."""
        self.lowest = min(self.lowest, found)
        self.is_lowered |= found < asked
        self.target.add(found, weights)

    def note_token(self, now: float) -> float | None:
        """A token is drawn now; returns the seconds since the one before."""
        between = now - self.newest if self.newest else None
        self.first, self.newest = self.first or now, now
        return between

    def bill(self, now: float) -> Bill:
        """What it spent until now."""
        job, meter = self.job, self.meter
        joined, first = self.joined or now, self.first or now
        return Bill(
            asked={"prefill": job.prefill_compute, "decode": job.compute},
            target=self.target.value(job.compute),
            is_held=self.is_held,
            compute=meter.compute,
            compute_with_context=meter.compute_with_context,
            ffn_fraction=meter.ffn_fraction,
            flops=meter.cost.flops.total,
            dense_flops=meter.dense.flops.total,
            tokens_by_width=tokens_by_width(meter),
            num_prompt_tokens=len(job.prompt),
            num_new_tokens=sum(len(line.writer.token_ids) for line in self.lines),
            num_draft_tokens=sum(meter.speculation.drafted),
            num_accepted_tokens=sum(meter.speculation.accepted),
            is_lowered=self.is_lowered,
            lowest=min(self.lowest, job.compute, job.prefill_compute),
            queue_seconds=joined - self.arrived,
            prefill_seconds=(self.read or joined) - joined,
            first_token_seconds=first - self.arrived,
            decode_seconds=max(0.0, self.newest - first) if self.newest else 0.0,
            total_seconds=now - self.arrived,
        )


def tokens_by_width(meter: Meter) -> dict[str, int]:
    """FFN width as a fraction -> how often a token took it in a layer that chooses."""
    found: dict[str, int] = {}
    for counts, sizes in meter.widths_taken():
        for count, size in zip(counts.tolist(), sizes.tolist(), strict=True):
            name = f"{size / meter.ffn_size:.4g}"
            found[name] = found.get(name, 0) + count
    return dict(sorted(found.items(), key=lambda item: float(item[0])))


def ticket_of(job: Job, arrived: float) -> Ticket:
    """What the scheduler needs to know of a job."""
    return Ticket(
        id=job.id,
        num_prompt_tokens=len(job.prompt),
        max_new_tokens=job.max_new_tokens,
        num_rows=job.n,
        arrived=arrived,
    )
