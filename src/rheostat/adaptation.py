"""`adapt`: fit in closed form, train if asked, measure the dial. The one path from a dense model to an adapted one."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rheostat import processes
from rheostat.adapted import Adapted
from rheostat.bases import base_facts
from rheostat.calibration import calibrate
from rheostat.config import setting
from rheostat.errors import SettingError, bad_setting
from rheostat.methods import Method
from rheostat.methods.base import Progress, no_progress
from rheostat.models import model_digest
from rheostat.provenance import provenance
from rheostat.text import pack, read_texts
from rheostat.train.settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BUILTIN_CALIBRATION = "builtin:calibration"
BUILTIN_HELD_OUT = "builtin:heldout"
MAX_NAMES = 16
"""More strings than this are taken for the texts themselves, not for the names of files."""


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How much text the closed-form fit and the dial's calibration see."""

    windows: int = setting(64, help="calibration windows for the closed-form fit")
    length: int = setting(512, help="tokens in a calibration window")
    dial_windows: int = setting(12, help="held-out windows on which the dial is measured")

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("length", 8), ("dial_windows", 1)):
            if getattr(self, name) < least:
                raise bad_setting(f"fit.{name}", getattr(self, name), f"{least} or more")


def adapt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    data: Any = BUILTIN_CALIBRATION,
    *,
    held_out: Any = BUILTIN_HELD_OUT,
    fit: FitSettings | None = None,
    train: TrainSettings | None = None,
    seed: int = 0,
    work_dir: str | Path | None = None,
    progress: Progress = no_progress,
) -> Adapted:
    """Turn a dense model, in place, into one whose compute is a dial.

    Args:
        model: a causal LM of a supported family; it becomes part of the result.
        tokenizer: its tokenizer.
        method: what to adapt it with, such as `rheostat.DynaMoE()`.
        data: text to fit and train on: a path, several, a list of strings, a `datasets` dataset, or
        `builtin:calibration`.
        held_out: text to measure the dial on, in the same forms; the kinds of text that will be served.
        fit: how much text the closed-form fit sees.
        train: how to train afterwards; the default does not.
        seed: of everything random.
        work_dir: where an interrupted run keeps what it has done, to resume from when called again with the
        same settings.
        progress: called with (what, done, total).

    Returns:
        The adapted model, its dial measured and its report filled.

    Raises:
        SettingError: the data is empty or too short, or the method refuses the model.
    """
    fit, train = fit or FitSettings(), train or TrainSettings()
    torch.manual_seed(seed)
    _check(model, tokenizer, method, train)
    texts = read_texts(data)
    windows = pack(tokenizer, texts, length=fit.length, limit=fit.windows, seed=seed, name="data")
    held = pack(tokenizer, read_texts(held_out), length=fit.length, limit=fit.dial_windows, seed=seed, name="held_out")
    facts: dict[str, Any] = {
        "base_digest": model_digest(model),
        "base": base_facts(model),
        "fit": asdict(fit),
        "train": asdict(train),
        # A list may hold the texts themselves, which are no part of a report.
        "held_out": _named(held_out),
    }
    key = _digest(method.to_dict(), facts["fit"], seed, facts["base_digest"], _digest_of(windows))
    teacher = copy.deepcopy(model) if train.tokens and method.wants_teacher() else None
    work = Path(work_dir) if work_dir is not None else None
    run = _Run(Adapted(model, method), seed, work, progress)
    try:
        facts |= run.fit(windows, key)
        if train.tokens:
            run.measure(held)
            wanted = -(-train.tokens // train.length)
            more = pack(tokenizer, texts, length=train.length, limit=wanted, seed=seed + 1, name="data")
            facts |= run.train(
                more, windows[: train.settle_windows], train, teacher, _digest(key, facts["train"], _digest_of(held))
            )
            del teacher
        facts["dial_seconds"] = run.measure(held)
    except BaseException:
        run.adapted.detach()  # so that the caller can try again with the same model
        raise
    run.adapted.report = {"provenance": provenance(seed=seed, base_digest=facts["base_digest"])} | facts
    return run.adapted


def _check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: Method, train: TrainSettings) -> None:
    """Refuse what cannot be before any work is done."""
    method.check(model)
    method.check_tokenizer(tokenizer)
    if train.tokens:
        from rheostat.train.trainer import check_settings

        check_settings(model, method, train)


@dataclass(frozen=True)
class _Run:
    """The steps of one adaptation, each of which changes `adapted` and returns facts for the report."""

    adapted: Adapted
    seed: int
    work: Path | None
    progress: Progress

    def fit(self, windows: torch.Tensor, key: str) -> dict[str, Any]:
        """The closed-form fit, or what an interrupted run with the same `key` kept of it."""
        started = time.perf_counter()
        with processes.main_first():  # the others take what it kept
            fitted = self._fit_or_restore(windows, key)
        return {"fitted": fitted, "fit_seconds": round(time.perf_counter() - started, 1)}

    def _fit_or_restore(self, windows: torch.Tensor, key: str) -> dict[str, Any]:
        adapted, work = self.adapted, self.work
        if work is None:
            return adapted.method.fit(adapted.model, windows, generator=self._generator(), progress=self.progress)
        file, parts = work / "fit.safetensors", work / f"fit-{key[:12]}"
        if _restore(adapted, file, key):
            return _kept_facts(file)
        fitted = adapted.method.fit(
            adapted.model, windows, generator=self._generator(), progress=self.progress, work_dir=parts
        )
        if processes.is_main():
            _keep(adapted, file, key, fitted)
        shutil.rmtree(parts, ignore_errors=True)
        return fitted

    def train(
        self,
        windows: torch.Tensor,
        settled_on: torch.Tensor,
        settings: TrainSettings,
        teacher: PreTrainedModel | None,
        key: str,
    ) -> dict[str, Any]:
        """Training with gradients on windows [N, T], from where an interrupted one with the same `key` stopped; and
        what the method solves anew for the trained weights, on the windows `settled_on`."""
        from rheostat.train.trainer import train

        if len(windows) < (wanted := -(-settings.tokens // settings.length)):
            logger.warning(
                "data: %d windows for %d wanted by train.tokens; they are seen more than once", len(windows), wanted
            )
        settle = partial(self._settle, settled_on)
        with tempfile.TemporaryDirectory() as scratch:
            trained = train(
                self.adapted,
                windows,
                settings,
                output_dir=Path(scratch) if self.work is None else self.work / f"train-{key[:12]}",
                teacher=teacher,
                settle=settle,
                seed=self.seed,
                progress=self.progress,
            )
        return {"trained": trained} | ({"settled": settle()} if settings.settles else {})

    def _settle(self, windows: torch.Tensor) -> dict[str, Any]:
        method = self.adapted.method
        return method.settle(self.adapted.model, windows, generator=self._generator(), progress=self.progress)

    def measure(self, held: torch.Tensor) -> float:
        """The dial, on windows of held-out text. Returns the seconds it took."""
        started = time.perf_counter()
        self.adapted.dial = calibrate(self.adapted, held, progress=self.progress)
        return round(time.perf_counter() - started, 1)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def _named(data: Any) -> str:
    """How to call a source of text in a report."""
    many = list(data) if isinstance(data, list | tuple) else [data]
    are_names = len(many) <= MAX_NAMES and all(isinstance(one, str | Path) and len(str(one)) < 200 for one in many)
    return ", ".join(map(str, many)) if are_names else "text"


# -- what an interrupted run keeps


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digest_of(windows: torch.Tensor) -> str:
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


def _keep(adapted: Adapted, file: Path, key: str, fitted: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    host = {f"host/{k}": v.clone() for k, v in adapted.model.state_dict().items()}
    method = {f"method/{k}": v.clone() for k, v in adapted.method.state(adapted.model).items()}
    temporary = file.with_suffix(".tmp")
    try:
        save_file(host | method, temporary, metadata={"key": key, "fitted": json.dumps(fitted)})
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)


def _restore(adapted: Adapted, file: Path, key: str) -> bool:
    """Whether a fit with the same settings was found and put back."""
    if not file.is_file():
        return False
    try:
        with safe_open(file, "pt") as opened:
            if opened.metadata().get("key") != key:
                return False
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # a damaged leftover is no reason to fail: fit again
        logger.warning("work_dir: %s cannot be read (%s); fitting again", file, error)
        return False
    host = {k.removeprefix("host/"): v for k, v in tensors.items() if k.startswith("host/")}
    method = {k.removeprefix("method/"): v for k, v in tensors.items() if k.startswith("method/")}
    adapted.method.load_state(adapted.model, method)
    missing, unknown = adapted.model.load_state_dict(host, strict=False)
    if missing or unknown:
        raise SettingError(f"work_dir: {file} belongs to another model; remove it")
    logger.info("resuming after the fit kept in %s", file)
    return True


def _kept_facts(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["fitted"])
