from __future__ import annotations

import pytest
import torch

from rheostat import families
from rheostat.methods.base import no_progress
from rheostat.methods.dynamoe.watching import frozen, layer_arguments, recording, sampled_gradients
from tests.tiny import CONTRACT_FAMILIES, tiny_model, tiny_windows


@pytest.mark.parametrize("family", CONTRACT_FAMILIES)
def test_layers_called_with_their_arguments_reproduce_the_model(family):
    model, windows = tiny_model(family), tiny_windows(5)
    with torch.no_grad():
        arguments, hidden = layer_arguments(model, windows, batch_tokens=64)
        for layer, by_size in zip(families.layers(model), arguments, strict=True):
            outs = [layer(batch, **by_size[len(batch)]) for batch in hidden.split(2)]
            hidden = torch.cat([out[0] if isinstance(out, tuple) else out for out in outs])
        wanted = model(input_ids=windows, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(families.decoder(model).norm(hidden), wanted, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_sampled_log_likelihood():
    """Nudging one FFN output changes the loss by the gradient times the nudge."""
    model, windows = tiny_model(), tiny_windows(2)
    with frozen(model):
        gradients = sampled_gradients(model, windows, torch.Generator().manual_seed(0), no_progress)
    assert [g.shape for g in gradients] == [(2 * 31, 32)] * 2

    def loss(nudge: torch.Tensor) -> float:
        handle = families.layers(model)[1].mlp.register_forward_hook(lambda _, __, out: out + nudge)
        with torch.no_grad():
            logits = model(input_ids=windows, use_cache=False).logits.flatten(0, 1).double()
        handle.remove()
        return float(torch.nn.functional.cross_entropy(logits, drawn, reduction="sum"))

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        logits = model(input_ids=windows, use_cache=False).logits.flatten(0, 1).float()
    drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    nudge = torch.zeros(2, 32, 32)
    nudge[0, 5, 3] = 1e-2
    slope = (loss(nudge) - loss(-nudge)) / 2e-2
    assert slope == pytest.approx(float(gradients[1][4, 3]), rel=2e-2, abs=1e-4)


def test_recording_leaves_no_hooks_after_an_error():
    model = tiny_model()
    with pytest.raises(RuntimeError, match="on purpose"), recording(model):
        raise RuntimeError("on purpose")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in families.layers(model)[0].modules())


def test_frozen_puts_back_what_it_found():
    model = tiny_model().train()
    families.head(model).weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        assert not model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert model.training


@pytest.mark.gpu
def test_lots_of_a_model_on_a_gpu_are_drawn_where_the_generator_is():
    model = tiny_model().cuda()
    with frozen(model):
        gradients = sampled_gradients(model, tiny_windows(2).cuda(), torch.Generator().manual_seed(0), no_progress)
    assert all(one.is_cuda and one.shape == (2 * 31, 32) for one in gradients)
