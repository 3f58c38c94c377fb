"""Freezing the dial: a plain checkpoint with every FFN cut to one slice."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from rheostat import families
from rheostat.errors import SettingError
from rheostat.geometry import Geometry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rheostat.methods.dynamoe.method import DynaMoE


def freeze(method: DynaMoE, model: PreTrainedModel, compute: float) -> tuple[Any, dict[str, torch.Tensor]]:
    raise NotImplementedError
