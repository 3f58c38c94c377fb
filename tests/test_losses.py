from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from rheostat.losses import ROWS, language_loss
from tests.tiny import tiny_windows


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


@pytest.mark.parametrize("z_weight", [0.0, 0.05])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("has_teacher", [True, False])
def test_value_and_gradient_are_those_of_the_plain_formula(weight: float, has_teacher: bool, z_weight: float):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 31, (3, ROWS), generator=generator)  # more rows than are taken at a time
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    logits, teacher = (2 * torch.randn(3, ROWS, 31, generator=generator) for _ in range(2))
    mine, twin = (logits.clone().requires_grad_(True) for _ in range(2))
    batch, known = {"input_ids": ids, "attention_mask": mask}, teacher if has_teacher else None
    total, parts = language_loss(mine, batch, known, weight, z_weight)
    (3 * total).backward()

    w = weight if has_teacher else 0.0
    pairs = (mask[:, :-1] & mask[:, 1:]).bool()
    scores, known = (x[:, :-1][pairs].log_softmax(-1) for x in (twin, teacher))
    plain = (1 - w) * cross_entropy(twin[:, :-1][pairs], ids[:, 1:][pairs])
    plain = plain + w * kl_div(scores, known, log_target=True, reduction="batchmean")
    z = twin[mask.bool()].logsumexp(-1).square().mean()  # the last token of a row has a normaliser, too
    plain = plain + z_weight * z
    (3 * plain).backward()
    assert parts.get("z") == (pytest.approx(float(z.detach())) if z_weight else None)
    torch.testing.assert_close(total, plain)
    torch.testing.assert_close(mine.grad, twin.grad, rtol=1e-4, atol=1e-7)


def test_sixteen_bit_logits_get_a_sixteen_bit_gradient():
    logits = torch.randn(1, 8, 31).bfloat16().requires_grad_(True)
    total, _ = language_loss(logits, {"input_ids": tiny_windows(1, 8) % 31}, None, 0.0)
    total.backward()
    assert total.dtype == torch.float32
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
