"""`DialTrainer`: the Hugging Face `Trainer` with rows at different dials, a dense teacher and a method's own loss.

Everything else (accelerate launch, FSDP, mixed precision, resuming, logging) is the Trainer's.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from rheostat import processes
from rheostat.adapted import Adapted
from rheostat.errors import SettingError, bad_setting
from rheostat.methods.base import Method, Progress, no_progress
from rheostat.spending import current_pass, current_spending, replay, spend
from rheostat.train import adapters
from rheostat.train.callbacks import ClipGroups, Clock, Settle
from rheostat.train.settings import TrainSettings

logger = logging.getLogger(__name__)


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Windows [N, T] of token ids as a dataset."""

    def __init__(self, windows: torch.Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index]}


def train(
    adapted: Adapted,
    windows: torch.Tensor,
    settings: TrainSettings,
    *,
    output_dir: Path,
    teacher: PreTrainedModel | None = None,
    settle: Callable[[], Any] | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Train an adapted model on windows [N, T], in place. An earlier run's checkpoint in `output_dir` is resumed.

    Args:
        teacher: the dense model to distil from; None trains on the text alone.
        settle: solves anew what the trained weights have outrun; called `settings.settles` times less one. The time
            after the end is the caller's.

    Returns:
        Steps, tokens seen (of all processes), seconds and the last logged losses.
    """
    check_settings(adapted.model, adapted.method, settings)
    torch.manual_seed(seed)  # the adapters' first values; the Trainer seeds the rest
    per_step = settings.batch_size * settings.accumulate * windows.shape[1] * processes.count()
    steps = max(1, settings.tokens // per_step)
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        warmup_steps=round(steps * settings.warmup_share),
        weight_decay=settings.weight_decay,
        lr_scheduler_type="cosine",
        max_grad_norm=0.0,  # by parameter group, see `ClipGroups`
        bf16=settings.bf16,
        logging_steps=max(1, steps // 50),
        save_strategy="no",  # by the clock, see `Clock`
        save_total_limit=1,
        include_num_input_tokens_seen=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=seed,
        data_seed=seed,
        use_cpu=adapted.device.type == "cpu",
        dataloader_pin_memory=adapted.device.type != "cpu",
    )
    with _only(adapted, settings):
        trainer = DialTrainer(
            adapted=adapted,
            settings=settings,
            teacher=teacher,
            args=arguments,
            train_dataset=Windows(windows),
            callbacks=[ClipGroups(), Clock(settings.save_minutes, progress)],
        )
        if settle is not None and not settings.lora_rank and not trainer.is_fsdp_enabled:  # whole, plain weights
            trainer.add_callback(Settle(settle, steps, settings.settles))
        if processes.count() > 1:  # dials and lessons of its own for each process
            torch.manual_seed(seed + 1_000_003 * processes.rank())
        # The Trainer prints its logs; ours go through `progress` and the report.
        trainer.pop_callback(_printer())
        last = _last_checkpoint(output_dir)
        if last is not None:
            logger.info("resuming training from %s", last)
        result = trainer.train(resume_from_checkpoint=None if last is None else str(last))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": steps,
        "tokens": trainer.state.num_input_tokens_seen,  # fewer than steps * per_step where the text is short
        "seconds": round(float(result.metrics["train_runtime"]), 1),
        "log": logged,
    }


def check_settings(model: PreTrainedModel, method: Method, settings: TrainSettings) -> None:
    """Refuse, before any work is done, training that cannot be: the model may be attached already or not yet.

    Raises:
        SettingError: the weights are float16; adapters are asked for and the method leaves the FFN as it is, or
            `peft` is not installed.
    """
    if model.dtype == torch.float16:
        raise bad_setting("dtype", "float16", "float32 or bfloat16 for training: steps are too small for float16")
    if not settings.lora_rank:
        return
    if not adapters.targets(model, set(method.trainable(model))):
        raise bad_setting(
            "train.lora_rank", settings.lora_rank, f"0: {method.name} as set trains no weights of the FFN"
        )
    if importlib.util.find_spec("peft") is None:
        raise SettingError(
            f"train.lora_rank={settings.lora_rank}: needs peft; install it with: pip install 'rheostat[lora]'"
        )


def _last_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that was written to its end: the Trainer writes the state's file last."""
    complete = [file.parent for file in output_dir.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda folder: int(folder.name.partition("-")[2]), default=None)


def _printer() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


class DialTrainer(Trainer):
    """Draws a `compute` for each row, runs the method's loss under it, and trains routers at a rate of their own."""

    def __init__(self, *, adapted: Adapted, settings: TrainSettings, teacher: PreTrainedModel | None, **kwargs: Any):
        super().__init__(model=adapted.model, **kwargs)
        self.adapted = adapted
        self.settings = settings
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False) if teacher is not None else None
        self.model_accepts_loss_kwargs = False  # our losses are means over the batch, to be divided when accumulating
        self._parts: dict[str, list[float]] = {}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        """The method's loss with one `compute` a row, drawn evenly from the training range."""
        rows = len(inputs["input_ids"])
        low = max(self.settings.low, self.adapted.dial.low)
        drawn = low + (max(low, self.settings.high) - low) * torch.rand(rows)
        teacher_logits = None
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                teacher_logits = self.teacher(**inputs, use_cache=False).logits
        # Not through the Trainer's wrapper for several processes: a method's loss may run the model more than once in a
        # step, which that forbids. `ClipGroups` averages the gradients instead.
        with spend(drawn if self.adapted.dial.low < 1 else 1.0, keep_passes=False):
            loss, parts = self.adapted.method.loss(self.adapted.model, inputs, teacher_logits)
        for name, part in parts.items():
            self._parts.setdefault(name, []).append(part)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise SettingError(
                f"train.learning_rate={self.settings.learning_rate}: the loss is {value}, must be finite; lower it"
            )
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of the loss's parts to what the Trainer logs."""
        means = {name: sum(values) / len(values) for name, values in self._parts.items()}
        self._parts = {}
        super().log(logs | means, *args, **kwargs)

    optimizer: torch.optim.Optimizer | None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with two learning rates."""
        if self.optimizer is None:
            routers: list[nn.Parameter] = []
            rest: list[nn.Parameter] = []
            for name, parameter in (model or self.model).named_parameters():
                if parameter.requires_grad:
                    (routers if ".router." in name else rest).append(parameter)
            groups = [
                {"params": rest, "lr": self.settings.learning_rate, "weight_decay": self.settings.weight_decay},
                {"params": routers, "lr": self.settings.router_learning_rate, "weight_decay": 0.0},
            ]
            self.optimizer = torch.optim.AdamW(
                [g for g in groups if g["params"]], betas=(0.9, 0.95), eps=1e-8, fused=True
            )
        return self.optimizer


@contextmanager
def _only(adapted: Adapted, settings: TrainSettings) -> Iterator[None]:
    """Only what the method trains wants gradients; with adapters, they stand in for the FFN's own weights and
    are merged after."""
    model = adapted.model
    wanted = set(adapted.method.trainable(model))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    had_cache, forward = model.config.use_cache, model.__dict__.get("forward")
    checkpoints = settings.gradient_checkpointing and not model.is_activation_checkpointing
    lora = None
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
        if settings.lora_rank:
            lora = adapters.Adapters(model, settings.lora_rank, wanted)
        if checkpoints:
            model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": _recomputed})
        model.train()
        yield
    finally:
        if lora is not None:
            lora.merge()
        if checkpoints:
            model.activation_checkpointing_disable()
        model.eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before.get(name, True))
        model.zero_grad(set_to_none=True)
        # The Trainer turns the cache off for good, and mixed precision leaves its own forward on the model.
        model.config.use_cache = had_cache
        model.__dict__.pop("_original_forward", None)
        model.__dict__.pop("forward", None)
        if forward is not None:
            model.forward = forward


def _recomputed() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For gradient checkpointing: recomputation comes after the `spend` block and must see its dial all the same."""
    return nullcontext(), replay(current_spending(), current_pass())
