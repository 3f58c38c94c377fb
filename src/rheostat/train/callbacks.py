"""What happens between the steps of a training: gradients clipped, routers settled, checkpoints by the clock."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from rheostat import processes
from rheostat.errors import bad_setting
from rheostat.methods.base import Progress

logger = logging.getLogger(__name__)

MAX_GRADIENT = 1.0
"""Norm that the gradients of a parameter group are clipped to."""
MAX_SKIPPED = 10
"""Steps in a row without finite gradients after which training is given up."""


class ClipGroups(TrainerCallback):
    """Averages the gradients over the processes, and clips those of routers and of all else apart: the routers' noisy
    labels must not scale down the rest. A step whose gradients are not finite changes nothing; many in a row are an
    error."""

    def __init__(self) -> None:
        self.num_skipped = 0  # in a row

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Each parameter group to a norm of at most `MAX_GRADIENT`.

        Raises:
            SettingError: `MAX_SKIPPED` steps in a row had gradients that were not finite.
        """
        groups = [group["params"] for group in kwargs["optimizer"].param_groups]
        processes.average_gradients(p for group in groups for p in group)
        norms = [torch.nn.utils.clip_grad_norm_(group, MAX_GRADIENT) for group in groups]
        if all(bool(torch.isfinite(norm)) for norm in norms):
            self.num_skipped = 0
            return
        for parameter in (p for group in groups for p in group):
            parameter.grad = None  # which the optimizer passes over
        self.num_skipped += 1
        logger.warning("training: the gradients of step %d are not finite; it changes nothing", state.global_step + 1)
        if self.num_skipped >= MAX_SKIPPED:
            raise bad_setting("train.learning_rate", args.learning_rate, "lower: gradients are not finite any more")


class Settle(TrainerCallback):
    """Calls `settle` at `times` - 1 steps, evenly spread: what it solves is not what this step's gradients wanted."""

    def __init__(self, settle: Callable[[], Any], steps: int, times: int) -> None:
        self.settle = settle
        self.at = {round(steps * k / times) for k in range(1, times)} - {steps}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At its steps. A checkpoint of the same step is written after it."""
        if state.global_step in self.at:
            self.settle()


class Clock(TrainerCallback):
    """Saves by the clock, not by the step (a step may take a second or a minute), and shows the progress."""

    def __init__(self, minutes: float, progress: Progress) -> None:
        self.every, self.last, self.progress = minutes * 60, time.monotonic(), progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for a checkpoint when it is time."""
        self.progress("training", state.global_step, state.max_steps)
        if time.monotonic() - self.last > self.every and state.global_step < state.max_steps:
            self.last, control.should_save = time.monotonic(), True
        return control
