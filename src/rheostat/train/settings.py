"""Settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from rheostat.config import setting
from rheostat.errors import bad_setting


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train after the closed-form fit. `tokens=0` (the default) is no training."""

    tokens: int = setting(0, help="tokens to train on; 0 trains nothing")
    length: int = setting(512, help="tokens in a window")
    batch_size: int = setting(4, help="windows in a step, on each device")
    accumulate: int = setting(1, help="steps whose gradients are added before the weights change")
    learning_rate: float = setting(2e-4, help="peak learning rate of the backbone (or of the adapters)")
    router_learning_rate: float = setting(1e-3, help="peak learning rate of the routers")
    warmup_share: float = setting(0.05, help="share of the steps in which the learning rate rises")
    weight_decay: float = setting(0.0, help="decoupled weight decay")
    low: float = setting(0.6, help="smallest compute drawn for a row of a batch; clamped to the dial's reach")
    high: float = setting(1.0, help="largest compute drawn for a row of a batch")
    lora_rank: int = setting(0, help="rank of low-rank adapters on the FFN instead of its full weights; 0 is none")
    settles: int = setting(
        1,
        help="times that the routers are fitted anew, in closed form, to what training made of the weights: evenly "
        "spread over the run, the last time after its end",
    )
    settle_windows: int = setting(24, help="calibration windows on which they are")
    save_minutes: float = setting(10.0, help="minutes between checkpoints that an interrupted run resumes from")
    bf16: bool = setting(False, help="mixed precision in bfloat16")
    gradient_checkpointing: bool = setting(False, help="recompute activations in backward to save memory")

    def __post_init__(self) -> None:
        for name in ("tokens", "lora_rank", "settles"):
            if getattr(self, name) < 0:
                raise bad_setting(f"train.{name}", getattr(self, name), "0 or more")
        for name in ("length", "batch_size", "accumulate", "settle_windows"):
            if getattr(self, name) < 1:
                raise bad_setting(f"train.{name}", getattr(self, name), "1 or more")
        for name in ("learning_rate", "router_learning_rate", "save_minutes"):
            if not getattr(self, name) > 0:
                raise bad_setting(f"train.{name}", getattr(self, name), "above 0")
        if not 0 <= self.warmup_share <= 1:
            raise bad_setting("train.warmup_share", self.warmup_share, "from 0 to 1")
        if not 0 < self.low <= self.high <= 1:
            raise bad_setting("train.low", self.low, f"above 0 and at most train.high={self.high}")
