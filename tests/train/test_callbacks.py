"""What happens between steps, on optimizers and states made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rheostat.errors import SettingError
from rheostat.train import callbacks
from rheostat.train.callbacks import MAX_GRADIENT, MAX_SKIPPED, ClipGroups, Clock, Settle


def test_groups_are_clipped_apart():
    groups = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [one]} for one in groups])
    groups[0].grad, groups[1].grad = torch.tensor([300.0, 400.0]), torch.tensor([0.3, 0.4])
    ClipGroups().on_pre_optimizer_step(None, None, None, optimizer=optimizer)
    assert groups[0].grad.norm().item() == pytest.approx(MAX_GRADIENT)
    assert groups[1].grad.tolist() == pytest.approx([0.3, 0.4])


def test_a_step_without_finite_gradients_changes_nothing(caplog):
    groups = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [one]} for one in groups])
    clip, state, args = ClipGroups(), SimpleNamespace(global_step=6), SimpleNamespace(learning_rate=0.1)

    def step(value: float) -> None:
        groups[0].grad, groups[1].grad = torch.tensor([value, 1.0]), torch.ones(2)
        clip.on_pre_optimizer_step(args, state, None, optimizer=optimizer)
        optimizer.step()

    for value in (float("inf"), float("nan")):
        step(value)
        assert [one.tolist() for one in groups] == [[1.0, 1.0], [1.0, 1.0]]
    assert "step 7" in caplog.text
    step(1.0)  # the count begins anew
    assert groups[0].tolist() != [1.0, 1.0]
    for _ in range(MAX_SKIPPED - 1):
        step(float("nan"))
    with pytest.raises(SettingError, match="learning_rate=0.1"):
        step(float("nan"))
    assert all(bool(torch.isfinite(one).all()) for one in groups)


@pytest.mark.parametrize(("times", "at"), [(0, []), (1, []), (2, [4]), (3, [3, 5]), (100, [*range(1, 8)])])
def test_settling_is_spread_evenly_and_never_at_the_end(times, at):
    settled, state = [], SimpleNamespace(global_step=0)
    callback = Settle(lambda: settled.append(state.global_step), steps=8, times=times)
    for state.global_step in range(1, 9):
        callback.on_step_end(None, state, None)
    assert settled == at


def test_checkpoints_are_asked_for_by_the_clock(monkeypatch):
    now, told, asked = [0.0], [], []
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    clock = Clock(2.0, lambda *call: told.append(call))
    for step, seconds in enumerate((100, 121, 200, 260, 400), 1):
        now[0], control = seconds, SimpleNamespace(should_save=False)
        clock.on_step_end(None, SimpleNamespace(global_step=step, max_steps=5), control)
        asked.append(control.should_save)
    assert asked == [False, True, False, True, False]  # the last step needs none
    assert told[0] == ("training", 1, 5)
