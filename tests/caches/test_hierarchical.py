"""The hierarchical cache: what is where, what it costs, and that it is an ordinary cache."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import DynamicCache

from rheostat.adapted import Adapted
from rheostat.caches.counting import body_length, saved_bytes
from rheostat.caches.hierarchical import HierarchicalCache, cache_bytes
from rheostat.caches.layer import SPARE, HierarchicalLayer
from rheostat.errors import SettingError
from rheostat.methods import QuantSpec
from tests.tiny import tiny_model, tiny_windows

G = 4
LENGTHS = (20, 13, 6, 3)
MASK = torch.tensor([[0] * (20 - n) + [1] * n for n in LENGTHS])
PROMPTS = tiny_windows(4, 20) * MASK


def states(length: int, rows: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.randn(2, rows, 2, length, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draws[0], draws[1]


def layer(length: int, *, padding: list[int] | None = None, group_size: int = G, num_planes: int = 2):
    """A layer with a prompt of `length` columns in it, and what went in."""
    one = HierarchicalLayer(group_size, 8, num_planes=num_planes)
    keys, values = states(length)
    one.padding = padding or []
    one.update(keys, values)
    return one, keys, values


def body_bytes(one: HierarchicalLayer) -> list[bytes]:
    return [t.numpy().tobytes() for body in one.body for t in body.tensors]


@pytest.mark.parametrize("length", range(1, 6 * G))
def test_the_split_after_a_prompt(length):
    one, keys, values = layer(length)
    (body,) = set(one.body_lengths)
    assert body == body_length(length, G)
    assert body % G == 0
    if length >= 2 * G:
        assert G <= one.buffer_lengths[0] <= 2 * G - 1
    else:
        assert body == 0
    for seen, given in zip(one.contents(), (keys, values), strict=True):
        assert torch.equal(seen[:, :, body:], given[:, :, body:])  # the buffer is exact
        assert (seen[:, :, :body] != given[:, :, :body]).any() == bool(body)
        torch.testing.assert_close(seen, given, rtol=0, atol=0.02)


@pytest.mark.parametrize("parts", [[30], [1] * 30, [7, 23], [20, 1, 1, 8], [9, 4, 4, 4, 9]])
def test_it_does_not_matter_how_the_tokens_came(parts):
    keys, values = states(30)
    one, start = HierarchicalLayer(G, 8), 0
    for n in parts:
        seen = one.update(keys[:, :, start : start + n], values[:, :, start : start + n])
        start += n
        assert seen[0].shape[2] == start
    whole, _, _ = layer(30)
    assert one.body_lengths == whole.body_lengths
    assert body_bytes(one) == body_bytes(whole)
    for mine, other in zip(one.contents(), whole.contents(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 20])
def test_rejecting_everything_leaves_no_trace(length):
    one, _, _ = layer(length)
    one.activate_past_recording()
    before, content = body_bytes(one), [t.clone() for t in one.contents()]
    for seed in range(5):
        one.update(*states(9, seed=seed + 1))
        assert body_bytes(one) == before  # nothing moves until it is known what stays
        one.crop(-9)
    assert body_bytes(one) == before
    assert all(torch.equal(a, b) for a, b in zip(one.contents(), content, strict=True))


def test_the_body_only_grows_and_by_whole_groups():
    one, _, _ = layer(10)
    one.activate_past_recording()
    old = one.body_lengths[0]
    for kept in (1, 3, 0, 4, 2, 4, 4):
        before = [t.clone() for body in one.body for t in body.tensors]
        one.update(*states(4, seed=kept))
        one.crop(kept - 4)
        new = one.body_lengths[0]
        assert (new - old) % G == 0
        for t, b in zip([t for body in one.body for t in body.tensors], before, strict=True):
            assert torch.equal(t[:, :, : b.shape[2]], b)
        old = new
        assert G <= one.buffer_lengths[0] <= 2 * G - 1


def test_rows_are_quantised_as_if_alone():
    keys, values = states(20, rows=4)
    together = HierarchicalLayer(G, 8)
    together.padding = [20 - n for n in LENGTHS]
    together.update(keys, values)
    together.update(*states(5, rows=4, seed=1))
    together.align([0, 2, 1, 3])  # rows take back different numbers
    more = states(9, rows=4, seed=2)
    together.update(*more)
    for row, (n, shift) in enumerate(zip(LENGTHS, (0, 2, 1, 3), strict=True)):
        alone = HierarchicalLayer(G, 8)
        one = slice(row, row + 1)
        alone.update(keys[one, :, 20 - n :], values[one, :, 20 - n :])
        new = [t[one, :, : 5 - shift] for t in states(5, rows=4, seed=1)]
        alone.update(*new)
        alone.update(*(t[one] for t in more))
        for mine, other in zip(together.contents(), alone.contents(), strict=True):
            assert torch.equal(mine[one, :, -alone.num_columns :], other)


def test_reading_four_bits_does_not_touch_the_lower_plane():
    one, keys, _ = layer(30)
    one.bits = 4
    before = one.contents()[0]
    one.body[0].tensors[1].random_(0, 256)
    assert torch.equal(one.contents()[0], before)
    one.bits = 8
    assert not torch.equal(one.contents()[0], before)
    fine, coarse = ((layer(30, num_planes=n)[0].contents()[0] - keys).abs().mean() for n in (2, 1))
    assert 10 * fine < coarse


def test_room_is_what_plain_decoding_would_read_unchanged():
    one, _, _ = layer(9)
    one.activate_past_recording()
    (room,) = set(one.room())
    before = list(one.body_lengths)
    one.update(*states(room + 1, seed=1))
    one.crop(-1)  # room tokens stay, and the next one still finds the same body
    assert one.body_lengths == before
    one.update(*states(1, seed=2))
    one.crop(0)
    assert one.body_lengths != before


def test_tokens_of_the_body_cannot_be_taken_back():
    one, _, _ = layer(20)
    with pytest.raises(ValueError, match="5 tokens cannot be taken back"):
        one.crop(-5)
    with pytest.raises(ValueError, match="0 or a negative number"):
        one.crop(1)


def test_bytes_are_counted():
    model = tiny_model()
    cache = HierarchicalCache(model.config, group_size=16)
    states_ = torch.randn(1, 2, 100, 8, dtype=torch.bfloat16)
    for i in range(2):
        cache.update(states_, states_, i)
    body, places = 80, 2 * 16 + SPARE
    keys = 2 * body * 8 + 2 * 2 * (body // 16) * 8 * 2  # two heads: two nibbles a number; scale and zero a group
    values = 2 * body * 8 + 2 * 2 * body * 2
    assert cache.num_bytes == 2 * (keys + values + 2 * 2 * places * 8 * 2)
    read = 2 * (keys + values)
    assert cache.saved_bytes == 2 * 2 * 2 * body * 8 * 2 - read
    assert cache.saved_bytes == 2 * saved_bytes(body, 2, 8, (16, 8), 8, 2)
    with cache.reading(4):
        assert cache.saved_bytes == 2 * saved_bytes(body, 2, 8, (16, 8), 4, 2)
    one_plane = HierarchicalCache(model.config, group_size=16, num_planes=1)
    one_plane.update(states_, states_, 0)
    assert one_plane.num_bytes == cache.num_bytes // 2 - 2 * body * 8


def test_at_8k_tokens_a_real_shape_takes_at_most_0_55_of_16_bit():
    one = HierarchicalLayer(128, 64)
    keys = torch.randn(1, 3, 8192, 64, dtype=torch.bfloat16)
    one.update(keys, keys)
    assert one.num_bytes / (2 * keys.nbytes) <= 0.55


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3_text"])
@pytest.mark.parametrize("num_planes", [1, 2])
def test_stock_generate_on_a_padded_batch_equals_single_rows(family, num_planes):
    model = tiny_model(family).double()
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}

    def written(ids, mask):
        cache = HierarchicalCache(model.config, group_size=G, num_planes=num_planes, attention_mask=mask)
        out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **settings)
        return out[:, ids.shape[1] :]

    together = written(PROMPTS, MASK)
    for row, n in enumerate(LENGTHS):
        assert torch.equal(written(PROMPTS[row : row + 1, 20 - n :], MASK[row : row + 1, 20 - n :])[0], together[row])


def test_beams_reorder_it():
    model = tiny_model("qwen3").double()
    settings = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    kwargs = {"input_ids": PROMPTS[:1], "attention_mask": MASK[:1]}
    exact = HierarchicalCache(model.config, group_size=32)  # nothing is quantised: reordering is all there is
    wanted = model.generate(**kwargs, **settings)
    assert torch.equal(model.generate(**kwargs, **settings, past_key_values=exact), wanted)
    assert max(layer.num_columns for layer in exact.hierarchical_layers) == 31
    quantised = HierarchicalCache(model.config, group_size=G)
    model.generate(**kwargs, **settings, past_key_values=quantised)
    assert quantised.hierarchical_layers[0].body_lengths == [24] * 3


def test_rows_can_be_repeated_and_selected():
    one, keys, values = layer(20)
    one.batch_repeat_interleave(2)
    one.batch_select_indices(torch.tensor([3, 0]))
    for seen, given in zip(one.contents(), layer(20)[0].contents(), strict=True):
        assert torch.equal(seen, given[[1, 0]])
    one.reset()
    assert one.get_seq_length() == 0
    one.update(keys, values)
    assert torch.equal(one.contents()[0], layer(20)[0].contents()[0])


def test_layers_with_a_window_stay_in_full_precision():
    config = tiny_model("gemma3_text").config
    config.layer_types = ["sliding_attention", "full_attention"]
    cache = HierarchicalCache(config, group_size=G)
    assert [isinstance(layer, HierarchicalLayer) for layer in cache.layers] == [False, True]


def test_an_adapted_model_tells_its_cache_what_is_padding():
    adapted = Adapted(tiny_model("qwen3").double(), QuantSpec(group_size=G, weight_group_size=8))
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    mine = adapted.generate(input_ids=PROMPTS, attention_mask=MASK, **settings)
    cache = HierarchicalCache(adapted.config, group_size=G, attention_mask=MASK)
    wanted = adapted.model.generate(input_ids=PROMPTS, attention_mask=MASK, past_key_values=cache, **settings)
    assert torch.equal(mine, wanted)
    assert cache.hierarchical_layers[0].body_lengths == [body_length(n + 19, G) for n in LENGTHS]


def test_bytes_of_a_stock_cache():
    cache = DynamicCache()
    cache.update(*states(3), 0)
    assert cache_bytes(cache) == 2 * 2 * 2 * 3 * 8 * 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 0}, "group_size=0: must be an integer of at least 1"),
        ({"value_group_size": 3}, "value_group_size=3: must be a divisor of the head width, 8"),
        ({"value_group_size": -1}, "value_group_size=-1"),
        ({"num_planes": 3}, "num_planes=3: must be 1 or 2"),
    ],
)
def test_bad_settings_name_themselves(settings, message):
    with pytest.raises(SettingError, match=message):
        HierarchicalCache(tiny_model().config, **settings)


@pytest.mark.parametrize(("num_planes", "bits"), list(itertools.product((1,), (8, 5))) + [(2, 3)])
def test_only_what_is_kept_can_be_read(num_planes, bits):
    cache = HierarchicalCache(tiny_model().config, num_planes=num_planes)
    with pytest.raises(SettingError, match=f"bits={bits}"), cache.reading(bits):
        pass
