"""Auxiliaries of their own: which layers they keep, which layer predicts which, and that all else is as ever."""

from __future__ import annotations

import pytest
import torch

from rheostat import families
from rheostat.adaptation import FitSettings, adapt
from rheostat.adapted import Adapted
from rheostat.artifact import save
from rheostat.calibration import calibrate
from rheostat.errors import SettingError
from rheostat.methods import Chain, QuantSpec
from rheostat.methods.kv_prediction import KVPrediction
from rheostat.methods.kv_prediction.auxiliary import kept_layers, kept_map, pruned_copy, spread_map
from rheostat.methods.kv_prediction.predictor import predictors
from rheostat.models import load
from rheostat.spending import spend
from tests.methods.kv_prediction.given import given
from tests.tiny import CONTRACT_FAMILIES, tiny_model, tiny_windows


def test_layers_kept_as_published():
    assert kept_layers((0.25,), 28) == list(range(0, 28, 4))
    assert kept_layers((0.5,), 28) == list(range(0, 28, 2))
    assert kept_layers((0.75,), 28) == [i for i in range(28) if i % 4 != 3]
    assert kept_layers((0, 3, 4), 28) == [0, 3, 4]
    assert len(kept_layers((0.4,), 30)) == 12
    for wrong in ((0, 28), (3, 1), (1, 1)):
        with pytest.raises(SettingError, match="kv_prediction.kept"):
            kept_layers(wrong, 28)


def test_maps_as_published():
    assert spread_map(28, 16) == [i // 2 if i < 24 else i - 12 for i in range(28)]
    assert spread_map(28, 20) == [i // 2 if i < 16 else i - 8 for i in range(28)]
    assert spread_map(36, 28) == [i // 2 if i < 16 else i - 8 for i in range(36)]
    assert spread_map(36, 20) == [i // 2 if i < 32 else i - 16 for i in range(36)]
    assert spread_map(36, 16) == [i // 3 if i < 12 else 4 + (i - 12) // 2 for i in range(36)]
    for share, wanted in (
        (0.25, [i // 4 for i in range(28)]),
        (0.5, [i // 2 for i in range(28)]),
        (0.75, [3 * (i // 4) + min(i % 4, 2) for i in range(28)]),
    ):
        assert kept_map(28, kept_layers((share,), 28)) == wanted
    assert spread_map(4, 8) == [0, 2, 4, 6]


@pytest.mark.parametrize("family", CONTRACT_FAMILIES)
def test_a_pruned_copy_is_the_model_with_layers_left_out_and_shares_nothing(family):
    model = tiny_model(family, layers=4)
    small = pruned_copy(model, [0, 2])
    ids = tiny_windows(2)
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert not shared
    if family == "llama":  # the same layers run one after the other
        kept = families.decoder(model).layers
        families.decoder(model).layers = torch.nn.ModuleList([kept[0], kept[2]])
        model.config.num_hidden_layers = 2
        kept[2].self_attn.layer_idx = 1
        with torch.no_grad():
            assert torch.equal(small(ids).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("family", CONTRACT_FAMILIES)
def test_a_copy_of_the_model_with_maps_of_identity_is_the_dense_model(family, caplog):
    ids = tiny_windows(2, 20)
    ids[:, 0] = 5
    adapted = Adapted(tiny_model(family), KVPrediction(auxiliary="pruned", kept=(0, 1)))
    assert "prompts will not be cheaper" in caplog.text
    maps = predictors(adapted.model)[0]
    with torch.no_grad():
        own = maps.run(ids[:1, :1], None, None)[1]
        for index, size in enumerate(maps.sizes):
            for one in (maps.key_maps[index], maps.value_maps[index]):
                one.weight.copy_(torch.eye(size))
                one.bias.zero_()
            maps.firsts[index].copy_(torch.cat([own["keys", index], own["values", index]], -1)[0, 0])
        dense = tiny_model(family)(ids).logits
        mask = torch.ones_like(ids)
        with spend(native={"kv_prediction": 2.0}) as meter:
            cache = adapted.method.make_cache(adapted.model)
            logits = adapted.method.prefill(adapted.model, ids, mask, cache)
        _, parts = adapted.method.loss(adapted.model, {"input_ids": ids})
    assert meter.num_side_tokens["auxiliary"] == 2 * 19
    torch.testing.assert_close(logits, dense[:, -1], rtol=1e-4, atol=1e-4)
    assert parts["consistency"] < 1e-5
    assert parts["auxiliary"] == pytest.approx(parts["lm"] + 1e-4 * parts["z"], rel=1e-4)


def test_gradients_reach_the_auxiliary_but_for_what_does_not_matter():
    adapted = given(auxiliary="pruned", kept=(0, 2), auxiliary_weight=0.0, consistency_weight=0.0)
    loss, _ = adapted.method.loss(adapted.model, {"input_ids": tiny_windows(4)})
    loss.backward()
    maps = predictors(adapted.model)[0]
    idle = (
        "layers.1.self_attn.q_proj",
        "layers.1.self_attn.o_proj",
        "layers.1.mlp",
        "layers.1.post_attention",
        "norm.",
    )
    for name, parameter in maps.auxiliary.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.any())
        assert moved != name.startswith(idle), name


def test_bad_maps_are_refused():
    for wrong, words in (((0, 0, 1, 2), "an index from 0 to 1"), ((0, 1), "of 4 entries")):
        with pytest.raises(SettingError, match=words):
            Adapted(tiny_model(layers=4), KVPrediction(auxiliary="pruned", kept=(0, 2), layer_map=wrong))


def test_a_second_turn_is_read_by_the_model_itself():
    adapted = given(auxiliary="pruned", kept=(0, 2))
    ids = tiny_windows(1, 20)
    mask = torch.ones_like(ids)
    cache = adapted.method.make_cache(adapted.model)
    with spend(adapted.dial.low) as meter, torch.no_grad():
        adapted.method.prefill(adapted.model, ids[:, :12], mask[:, :12], cache)
        adapted.method.prefill(adapted.model, ids[:, 12:], mask, cache)
    assert meter.num_side_tokens["auxiliary"] == 11
    assert cache.get_seq_length() == 20


def test_the_meter_agrees_with_the_formula():
    adapted = given(auxiliary="pruned", kept=(0, 2))
    with spend(adapted.dial.low) as meter, torch.no_grad():
        ids = tiny_windows(1, 12)
        adapted.method.prefill(adapted.model, ids, torch.ones_like(ids), adapted.method.make_cache(adapted.model))
    assert meter.cost == adapted.method.cost(adapted.geometry, compute=adapted.dial.low, num_tokens=12, itemsize=4)


def test_flops_are_twice_the_parameters_that_a_token_meets():
    """So ratios of parameter counts, as the paper prints them, are what the meter says of a prompt."""
    adapted = given(auxiliary="pruned", kept=(0, 2))
    maps = predictors(adapted.model)[0]
    ids = tiny_windows(1, 12)
    with spend(adapted.dial.low) as meter, torch.no_grad():
        adapted.method.prefill(adapted.model, ids, torch.ones_like(ids), adapted.method.make_cache(adapted.model))

    def weights(module):
        return sum(one.numel() for one in module.parameters() if one.dim() == 2)

    small, whole = (weights(families.decoder(one).layers) for one in (maps.host[0], adapted.model))
    assert meter.cost.flops.auxiliary == 2 * 11 * (small + maps.num_weights)
    assert meter.dense.flops.attention + meter.dense.flops.ffn == 2 * 12 * whole


def test_maps_for_another_auxiliary_are_refused():
    tensors = given(auxiliary="pruned", kept=(0, 2)).method.state(given(auxiliary="pruned", kept=(0, 2)).model)
    deeper = given(auxiliary="pruned", kept=(0, 1, 2))
    with pytest.raises(SettingError, match=r"tensor .* is missing"):
        deeper.method.load_state(deeper.model, tensors)
    name = "0.key_maps.0.weight"
    same = given(auxiliary="pruned", kept=(0, 2))
    with pytest.raises(SettingError, match="learned for a model of another geometry"):
        same.method.load_state(same.model, tensors | {name: tensors[name][:, :-1]})


def small_folder(tmp_path, tokenizer, vocab=None):
    """A one-layer model of another head width, saved with a tokenizer."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto import CONFIG_MAPPING

    from tests.tiny import SIZES

    torch.manual_seed(3)
    sizes = SIZES | {"num_hidden_layers": 1, "hidden_size": 24, "head_dim": 6, "num_key_value_heads": 1}
    sizes["vocab_size"] = vocab or len(tokenizer)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**sizes)).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    return str(tmp_path / "small")


def test_a_smaller_model_with_the_same_tokenizer_reads_prompts(tmp_path, tiny_model_folder, tiny_tokenizer, tiny_text):
    model, tokenizer = load(tiny_model_folder)
    method = KVPrediction(auxiliary=small_folder(tmp_path, tiny_tokenizer))
    fit = FitSettings(windows=8, length=32, dial_windows=2)
    adapted = adapt(model, tokenizer, method, tiny_text, held_out=tiny_text, fit=fit)
    assert adapted.dial.low < 0.8
    ids = tiny_windows(1, 16)
    folder = save(adapted, tokenizer, tmp_path / "saved")
    again, _ = load(folder)
    with spend(adapted.dial.low) as meter:
        mine = adapted.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(again.generate(ids, max_new_tokens=4, do_sample=False), mine)
    assert meter.num_side_tokens["auxiliary"] == 30
    cache, own = (adapted.method.make_cache(adapted.model) for _ in range(2))
    with spend(adapted.dial.low), torch.no_grad():
        adapted.method.prefill(adapted.model, ids, torch.ones_like(ids), cache)
        adapted.model(ids, past_key_values=own)
    for mine, wanted in zip(cache.layers, own.layers, strict=True):  # its head is of another width than the model's
        assert (mine.keys.shape, mine.values.shape) == (wanted.keys.shape, wanted.values.shape)


def test_a_smaller_model_with_another_tokenizer_is_refused(tmp_path, tiny_model_folder, tiny_tokenizer, tiny_text):
    import copy

    model, tokenizer = load(tiny_model_folder)
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["<more>"])
    method = KVPrediction(auxiliary=small_folder(tmp_path, other, len(tiny_tokenizer)))
    with pytest.raises(SettingError, match="its tokenizer is not the model's"):
        adapt(model, tokenizer, method, tiny_text, held_out=tiny_text)


def test_calibrated_on_one_step():
    adapted = given(auxiliary="pruned", kept=(0, 2))
    assert adapted.dial.settings["kv_prediction"] == (0.0, 4.0)
    assert calibrate(adapted, tiny_windows(seed=1)) == adapted.dial


def test_padding_is_no_part_of_a_quantised_cache():
    methods = [KVPrediction(auxiliary="pruned", kept=(0, 2)), QuantSpec(group_size=4, weight_group_size=8)]
    adapted = Adapted(tiny_model(layers=4).double(), Chain(methods))
    ids = tiny_windows(1, 24)
    answers = []
    for num_pads in (0, 3):
        mask = torch.tensor([[0] * num_pads + [1] * 25])
        prompt, cache = torch.nn.functional.pad(ids, (num_pads, 0)), adapted.method.make_cache(adapted.model)
        with spend(native={"kv_prediction": 2.0}), torch.no_grad():
            adapted.method.prefill(adapted.model, prompt, mask[:, :-1], cache)
            answers.append(adapted.method.decode(adapted.model, ids[:, :1], mask, cache))
        assert cache.hierarchical_layers[0].padding == [num_pads]
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-5, atol=1e-5)


def test_a_pruned_copy_rotates_where_its_layers_did():
    model = tiny_model("smollm3", layers=8)
    kept = [0, 3, 4, 7]
    bare = [not layer.self_attn.use_rope for layer in families.layers(model)]
    assert any(bare)
    assert not all(bare)
    assert [not one.self_attn.use_rope for one in families.layers(pruned_copy(model, kept))] == [bare[k] for k in kept]


def test_the_auxiliarys_own_logits_are_capped_as_its_model_caps_them():
    model = tiny_model("gemma2")
    model.config.final_logit_softcapping = 1.0
    adapted = Adapted(model, KVPrediction(auxiliary="pruned", kept=(0,)))
    maps, ids = predictors(adapted.model)[0], tiny_windows(2)
    with torch.no_grad():
        mine, wanted = maps.logits(maps.run(ids, None, None)[0]), maps.host[0](ids).logits
    assert wanted.abs().max() > 0.9  # there is something to cap
    torch.testing.assert_close(mine, wanted)
