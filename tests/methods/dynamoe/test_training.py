from __future__ import annotations

import dataclasses

import pytest
import torch

from rheostat.methods.dynamoe.training import _routers_loss, language_loss, loss
from rheostat.spending import spend
from tests.test_contract import fitted
from tests.tiny import tiny_model, tiny_windows


def test_language_loss_is_cross_entropy_without_a_teacher():
    batch = {"input_ids": tiny_windows(2, 10)}
    logits = torch.randn(2, 10, 97, generator=torch.Generator().manual_seed(0))
    total, parts = language_loss(logits, batch, None, distill_weight=1.0)
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    torch.testing.assert_close(total, wanted)
    assert set(parts) == {"lm"}


def test_distillation_is_zero_at_the_teacher_and_mixes():
    batch = {"input_ids": tiny_windows(2, 10)}
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(2, 10, 97, generator=generator) for _ in range(2))
    assert float(language_loss(logits, batch, logits, 1.0)[0]) == pytest.approx(0, abs=1e-6)
    whole = [float(language_loss(logits, batch, teacher, weight)[0]) for weight in (0.0, 0.5, 1.0)]
    assert whole[1] == pytest.approx((whole[0] + whole[2]) / 2, rel=1e-5)


def test_padding_does_not_count():
    ids = tiny_windows(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(2, 10, 97, generator=generator) for _ in range(2))
    before = language_loss(logits, {"input_ids": ids, "attention_mask": mask}, teacher, 0.5)[0]
    ids = ids.clone()
    ids[0, :4] = 7
    logits, teacher = logits.clone(), teacher.clone()
    logits[0, :4] += 5
    teacher[0, :4] -= 5
    assert torch.equal(before, language_loss(logits, {"input_ids": ids, "attention_mask": mask}, teacher, 0.5)[0])


def test_router_loss_never_reaches_the_backbone():
    adapted = fitted("dynamoe", "llama")
    method = dataclasses.replace(adapted.method, distill_weight=1.0)
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
