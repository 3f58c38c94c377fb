"""Prompts that are read ahead: what the cache holds, what runs, what is paid, and that `generate` goes through it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import TextIteratorStreamer

from rheostat import families
from rheostat.adapted import Adapted
from rheostat.decode import stream
from rheostat.dial import Dial
from rheostat.errors import SettingError
from rheostat.methods import Chain, KVPrediction, QuantSpec
from rheostat.methods.base import Method
from rheostat.methods.kv_prediction import predictor
from rheostat.methods.kv_prediction.reading import depth_for
from rheostat.spending import spend
from tests.methods.kv_prediction.given import exact, given
from tests.tiny import CONTRACT_FAMILIES, FAMILIES, tiny_model, tiny_windows


def prefill(adapted: Adapted, ids: torch.Tensor, mask: torch.Tensor | None = None):
    cache = adapted.method.make_cache(adapted.model)
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        return adapted.method.prefill(adapted.model, ids, mask, cache), cache


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_maps_give_the_dense_model_in_prefill_and_every_step_after(family):
    ids = tiny_windows(2, 20)
    ids[:, 0] = 5
    adapted, dense = exact(family, 5), tiny_model(family)
    mask = torch.ones_like(ids)
    steps = []
    with spend({"prefill": adapted.dial.low}) as meter, torch.no_grad():
        logits, cache = prefill(adapted, ids[:, :12])
        steps.append(logits)
        for t in range(12, 20):
            steps.append(adapted.method.decode(adapted.model, ids[:, t : t + 1], mask[:, : t + 1], cache))
    assert meter.num_side_tokens["auxiliary"] == 2 * 11  # it was not simply dense
    with torch.no_grad():
        wanted = dense(ids).logits[:, 11:]
    torch.testing.assert_close(torch.stack(steps, 1), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("broken", ["unrotated", "unnormed", "shifted"])
def test_keys_finished_wrongly_break_the_identity(monkeypatch, broken):
    ids = tiny_windows(1, 12)
    ids[:, 0] = 5
    adapted = exact("qwen3", 5)
    finish = families.KeyValue.finish_keys

    def wrong(self, raw, position_ids):
        if broken == "unrotated":
            return self.norm_keys(raw).transpose(1, 2)
        if broken == "shifted":
            return finish(self, raw, position_ids * 2)
        monkeypatch.setattr(families.KeyValue, "norm_keys", lambda one, keys: one._heads(keys))
        return finish(self, raw, position_ids)

    monkeypatch.setattr(families.KeyValue, "finish_keys", wrong)
    with spend(adapted.dial.low):
        logits, _ = prefill(adapted, ids)
    with torch.no_grad():
        wanted = tiny_model("qwen3")(ids).logits[:, -1]
    assert not torch.allclose(logits, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", CONTRACT_FAMILIES)
def test_below_the_depth_the_cache_is_the_models_own_and_every_layer_holds_all_tokens(family):
    adapted = given(family)
    ids = tiny_windows(2, 14)
    with spend(native={"kv_prediction": 2.0}):
        _, cache = prefill(adapted, ids)
    own = adapted.method.make_cache(adapted.model)
    with torch.no_grad():
        adapted.model(ids, past_key_values=own)
    for layer in range(4):
        mine, wanted = cache.layers[layer], own.layers[layer]
        assert mine.keys.shape == wanted.keys.shape
        assert mine.values.shape == wanted.values.shape
        same = torch.allclose(mine.keys[:, :, :-1], wanted.keys[:, :, :-1], rtol=1e-3, atol=1e-3)
        assert same == (layer < 2)
    assert cache.get_seq_length() == 14


@pytest.mark.parametrize("num_exact", [1, 3])
def test_only_the_last_tokens_pass_the_predicted_layers(num_exact):
    adapted = given(exact_tokens=num_exact)
    seen = {}
    for index, layer in enumerate(families.layers(adapted.model)):
        layer.mlp.register_forward_hook(lambda m, a, o, i=index: seen.setdefault(i, []).append(o.shape[1]))
    with spend(native={"kv_prediction": 2.0}):
        prefill(adapted, tiny_windows(1, 10))
    assert seen == {0: [10 - num_exact, num_exact], 1: [10 - num_exact, num_exact], 2: [num_exact], 3: [num_exact]}


def test_steps_after_the_prompt_need_no_maps():
    adapted = given()
    ids, mask = tiny_windows(1, 12), torch.ones(1, 14, dtype=torch.long)
    with spend(native={"kv_prediction": 2.0}):
        _, cache = prefill(adapted, ids)
    again = copy.deepcopy(cache)
    with torch.no_grad():
        with spend(native={"kv_prediction": 2.0}):
            one = adapted.method.decode(adapted.model, ids[:, :1], mask[:, :13], cache)
        predictor.detach(adapted.model)
        two = Method().decode(adapted.model, ids[:, :1], mask[:, :13], again)
    assert torch.equal(one, two)


def test_the_first_token_of_the_prompt_matters():
    adapted = given()
    ids = tiny_windows(1, 12)
    other = ids.clone()
    other[0, 1] = 50
    with spend(adapted.dial.low):
        assert not torch.allclose(prefill(adapted, ids)[0], prefill(adapted, other)[0])


def test_a_prompt_of_one_token_is_read_by_the_model_alone():
    adapted = given()
    ids = tiny_windows(2, 1)
    with spend(adapted.dial.low) as meter:
        logits, _ = prefill(adapted, ids)
    with torch.no_grad():
        assert torch.equal(logits, adapted.model(ids).logits[:, -1])
    assert meter.num_side_tokens["auxiliary"] == 0
    assert meter.compute == 1.0


@pytest.mark.parametrize("family", CONTRACT_FAMILIES)
def test_greedy_generate_equals_a_manual_loop(family):
    adapted = given(family)
    ids = tiny_windows(2, 20)
    with spend(adapted.dial.low), torch.no_grad():
        given_text = adapted.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        logits, cache = prefill(adapted, ids)
        wanted, mask = ids, torch.ones_like(ids)
        for _ in range(6):
            wanted = torch.cat([wanted, logits.argmax(-1, keepdim=True)], 1)
            mask = torch.ones_like(wanted)
            logits = adapted.method.decode(adapted.model, wanted[:, -1:], mask, cache)
    assert torch.equal(given_text, wanted)
    streamed = []
    with spend(adapted.dial.low):
        streamed = [step.token_ids for step in stream(adapted, ids, max_new_tokens=6)]
    assert torch.equal(torch.stack(streamed, 1), wanted[:, 20:])


def test_a_padded_batch_generates_what_its_rows_do_alone():
    adapted = given()
    ids = tiny_windows(3, 16)
    mask = torch.tensor([[0] * (16 - n) + [1] * n for n in (16, 9, 1)])
    with spend({"prefill": adapted.dial.low}):
        together = adapted.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        for row, n in enumerate((16, 9, 1)):
            alone = adapted.generate(ids[row : row + 1, 16 - n :], max_new_tokens=5, do_sample=False)
            assert torch.equal(together[row, 16 - n :], alone[0])


@pytest.mark.parametrize("family", CONTRACT_FAMILIES)
def test_rows_with_dials_of_their_own_are_read_each_at_its_depth(family):
    adapted = given(family)
    ids = tiny_windows(3, 20)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    computes = [1.0, adapted.dial.low, adapted.dial.compute[1]]
    together = adapted.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, compute=computes)
    for row, compute in enumerate(computes):
        one = slice(row, row + 1)
        alone = adapted.generate(ids[one], attention_mask=mask[one], max_new_tokens=5, do_sample=False, compute=compute)
        assert torch.equal(together[one], alone)


@pytest.mark.parametrize("family", CONTRACT_FAMILIES)
@pytest.mark.parametrize("previous", [(), (0.0, 1.0)])
def test_a_second_chunk_on_a_filled_cache_is_as_one_long_prompt(family, previous):
    adapted = given(family, previous=previous)
    ids = tiny_windows(2, 20)
    mask = torch.ones_like(ids)
    with spend(native={"kv_prediction": 2.0}), torch.no_grad():
        # Below the depth both see the whole conversation; what differs is that the first chunk's last token is exact,
        # and that maps which read the token before do not have the one before the second chunk.
        cache = adapted.method.make_cache(adapted.model)
        adapted.method.prefill(adapted.model, ids[:, :12], mask[:, :12], cache)
        adapted.method.prefill(adapted.model, ids[:, 12:], mask, cache)
        _, whole = prefill(adapted, ids)
    for layer in range(4):
        mine, wanted = cache.layers[layer].keys, whole.layers[layer].keys
        different = ~torch.isclose(mine, wanted, rtol=1e-3, atol=1e-3).all(-1).all(1).all(0)
        seams = {different.numel() - 9, different.numel() - 8} if previous else {different.numel() - 9}
        assert set(different[:-1].nonzero().flatten().tolist()) <= (seams if layer >= 2 else set())


def test_a_conversation_goes_on_with_its_cache():
    adapted = given()
    ids = tiny_windows(1, 20)
    cache = adapted.method.make_cache(adapted.model)
    with spend({"prefill": adapted.dial.low}) as meter:
        first = adapted.generate(ids[:, :12], past_key_values=cache, max_new_tokens=3, do_sample=False)
        longer = torch.cat([first, ids[:, 12:]], 1)
        second = adapted.generate(longer, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert second.shape[1] == longer.shape[1] + 3
    # 11 of the first prompt; of the second turn all but its last token, and the answer's last token, not yet read.
    assert meter.num_side_tokens["auxiliary"] == 11 + 8
    assert cache.get_seq_length() == second.shape[1] - 1


def test_beams_samples_and_processors_work():
    adapted = given()
    ids = tiny_windows(2, 12)
    with spend({"prefill": adapted.dial.low}) as meter:
        beams = adapted.generate(ids, max_new_tokens=4, num_beams=3, do_sample=False)
        torch.manual_seed(0)
        drawn = adapted.generate(ids, max_new_tokens=4, do_sample=True, num_return_sequences=2)
        out = adapted.generate(
            ids,
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            bad_words_ids=[[7]],
        )
    assert beams.shape == (2, 16)
    assert drawn.shape == (4, 16)
    assert len(out.logits) == 4
    assert not (out.sequences[:, 12:] == 7).any()
    assert meter.num_side_tokens["auxiliary"] > 0


def test_text_streams(tmp_path):
    class Letters:
        def decode(self, ids, **kwargs):
            return "".join(chr(97 + int(i) % 26) for i in ids)

    adapted = given()
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True, timeout=60)
    with spend({"prefill": adapted.dial.low}):
        out = adapted.generate(tiny_windows(1, 12), max_new_tokens=6, do_sample=False, streamer=streamer)
    assert "".join(streamer) == Letters().decode(out[0, 12:])


def test_outside_spend_and_at_full_compute_generate_is_the_hosts_own():
    adapted, dense = given(), tiny_model(layers=4)
    ids = tiny_windows(2, 12)
    wanted = dense.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(adapted.generate(ids, max_new_tokens=5, do_sample=False), wanted)
    assert torch.equal(adapted.generate(ids, max_new_tokens=5, do_sample=False, compute=1.0), wanted)
    adapted.detach()
    assert "_prefill" not in adapted.model.__dict__


def test_the_meter_bills_auxiliary_and_maps_and_knows_the_dense_cost():
    adapted = given(rank=0, inputs=(), previous=())
    geometry = adapted.geometry
    with spend(native={"kv_prediction": 2.0}) as meter:
        prefill(adapted, tiny_windows(1, 12))
    weights = 2 * geometry.hidden_size * geometry.kv_values
    layer = geometry.attention_weights + geometry.ffn_weights
    assert meter.cost.flops.auxiliary == 2 * 11 * (2 * layer + weights)
    assert meter.dense == Method().cost(geometry, num_tokens=11, num_logits=0, itemsize=4) + Method().cost(
        geometry, num_tokens=1, past=11, itemsize=4
    )
    assert meter.cost == adapted.method.cost(geometry, compute=adapted.dial.compute[2], num_tokens=12, itemsize=4)
    assert meter.num_prefill_tokens == 12
    assert meter.num_decode_tokens == 0


@pytest.mark.parametrize("runtime", ["stock", "native"])
def test_no_ffn_is_narrower_for_a_predicted_prompt(runtime):
    adapted = given()
    with spend({"prefill": adapted.dial.low}) as meter:
        adapted.generate(tiny_windows(1, 12), max_new_tokens=2, do_sample=False, runtime=runtime)
    assert meter.compute < 1
    assert meter.ffn_fraction == 1.0


def test_between_two_depths_the_cheaper_counts():
    adapted = given()
    found = [depth_for(adapted.model, setting) for setting in (0.0, 0.2, 1.0, 1.1, 2.0, 3.0, 9.0)]
    assert found == [None, 3, 3, 2, 2, 1, 1]


def test_compute_below_the_reach_is_refused():
    adapted = given()
    with pytest.raises(SettingError, match="compute"):
        adapted.generate(tiny_windows(1, 8), max_new_tokens=1, compute={"prefill": adapted.dial.low - 0.05})


def test_the_token_before_is_read_past_padding_and_first_tokens():
    from rheostat.methods.kv_prediction.predictor import _before

    x = torch.arange(12.0).view(2, 6, 1)
    is_first = torch.tensor([[True] * 3 + [False] * 3, [False] * 6])  # two of padding and a first; a later chunk
    assert _before(x, is_first)[..., 0].tolist() == [[0, 1, 2, 3, 3, 4], [6, 6, 7, 8, 9, 10]]


def test_rows_at_several_depths_share_a_quantised_cache():
    methods = [KVPrediction(auxiliary="pruned", kept=(0, 2)), QuantSpec(group_size=4, weight_group_size=8)]
    dial = Dial(compute=(1.0, 0.5), settings={"kv_prediction": (0.0, 2.0)})
    adapted = Adapted(tiny_model(layers=4).double(), Chain(methods), dial)
    ids, lengths = tiny_windows(4, 20), (20, 6, 13, 17)
    mask = torch.tensor([[0] * (20 - n) + [1] * n for n in lengths])

    def answer(ids, mask, asked):
        with spend(asked), torch.no_grad():
            logits, cache = prefill(adapted, ids, mask)
            longer = torch.nn.functional.pad(mask, (0, 1), value=1)
            return torch.cat([logits, adapted.method.decode(adapted.model, ids[:, -1:], longer, cache)])

    for asked in ([0.5, 1.0, 0.5, 1.0], [1.0, 0.5, 1.0, 1.0]):  # a short row with long ones, and by itself
        together = answer(ids * mask, mask, asked)
        for row, n in enumerate(lengths):
            one = ids[row : row + 1, 20 - n :]
            alone = answer(one, torch.ones_like(one), asked[row])
            torch.testing.assert_close(together[row::4], alone, rtol=1e-5, atol=1e-5)
