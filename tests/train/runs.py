"""A training of a few steps on a tiny model, and what it changed."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import torch

from rheostat.adapted import Adapted
from rheostat.train.settings import TrainSettings
from rheostat.train.trainer import train
from tests.tiny import tiny_model, tiny_windows

SETTINGS = TrainSettings(tokens=6 * 4 * 32, length=32, batch_size=4, learning_rate=1e-3, low=0.5)
TEACHER = tiny_model()


def weights(adapted: Adapted) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in adapted.model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert list(before) == list(after)
    return {key for key in before if not torch.equal(before[key], after[key])}


def run(adapted: Adapted, folder: Path, *, windows: torch.Tensor | None = None, progress=None, **settings) -> dict:
    return train(
        adapted,
        tiny_windows(16) if windows is None else windows,
        dataclasses.replace(SETTINGS, **settings),
        output_dir=folder,
        teacher=copy.deepcopy(TEACHER),
        seed=0,
        progress=progress or (lambda what, done, total: None),
    )
