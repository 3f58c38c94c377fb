from __future__ import annotations

import dataclasses

import pytest
import torch

from rheostat.methods.dynamoe.training import _routers_loss, loss
from rheostat.spending import spend
from tests.test_contract import fitted
from tests.tiny import tiny_model, tiny_windows


def test_router_loss_never_reaches_the_backbone():
    adapted = fitted("dynamoe", "llama")
    method = dataclasses.replace(adapted.method, distill_weight=1.0, router_loss_share=1.0)
    adapted.model.requires_grad_(True)
    ids = tiny_windows(3)
    with torch.no_grad(), spend(0.8):
        same = adapted.model(input_ids=ids).logits  # a teacher that agrees: only the routers have a loss
    with spend(0.8):
        total, parts = loss(method, adapted.model, {"input_ids": ids}, same)
    total.backward()
    assert parts["distill"] == pytest.approx(0, abs=1e-5)
    moved = {name for name, p in adapted.model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-6}
    assert moved
    assert all(".router." in name for name in moved)


def test_rows_may_have_dials_of_their_own():
    adapted = fitted("dynamoe", "llama")
    with spend([1.0, 0.8, 0.7]):
        total, _ = adapted.method.loss(
            adapted.model, {"input_ids": tiny_windows(3)}, tiny_model()(tiny_windows(3)).logits
        )
    assert torch.isfinite(total)


def test_a_row_of_one_token_teaches_the_routers_nothing():
    adapted = fitted("dynamoe", "llama")
    batch = {"input_ids": tiny_windows(1, 6), "attention_mask": torch.tensor([[0, 0, 0, 0, 0, 1]])}
    with spend(0.8):
        assert float(_routers_loss(adapted.method, adapted.model, batch)) == 0.0


def test_the_routers_learn_in_their_share_of_the_steps():
    adapted = fitted("dynamoe", "llama")
    batch = {"input_ids": tiny_windows(2)}
    torch.manual_seed(0)
    for share, low, high in ((0.0, 0, 0), (0.5, 2, 14), (1.0, 16, 16)):
        method = dataclasses.replace(adapted.method, router_loss_share=share)
        with spend(0.8):
            lessons = sum("router" in loss(method, adapted.model, batch, None)[1] for _ in range(16))
        assert low <= lessons <= high
