from __future__ import annotations

import pytest
import torch

from rheostat.errors import SettingError
from rheostat.geometry import Geometry
from rheostat.methods.dynamoe.freezing import freeze, slice_computes
from tests.test_contract import fitted


def test_slice_computes_end_at_the_dense_model():
    geometry = Geometry.from_config(fitted("dynamoe", "llama").config)
    computes = slice_computes(geometry, (16, 32, 48, 64))
    assert computes == sorted(computes)
    assert computes[-1] == 1.0
    ffn_share = 2 * geometry.num_layers * geometry.ffn_weights / geometry.token_flops
    assert computes[0] == pytest.approx(1 - 0.75 * ffn_share)


def test_the_widest_slice_within_the_budget_is_taken():
    adapted = fitted("dynamoe", "llama")
    computes = slice_computes(adapted.geometry, (16, 32, 48, 64))
    for size, low, high in zip((16, 32, 48), computes, computes[1:], strict=False):
        config, state = freeze(adapted.model, (low + high) / 2)
        assert config.intermediate_size == size
        assert state["model.layers.0.mlp.down_proj.weight"].shape == (32, size)
    assert freeze(adapted.model, 1.0)[0].intermediate_size == 64
    assert adapted.config.intermediate_size == 64


def test_below_the_smallest_slice_all_slices_are_named():
    adapted = fitted("dynamoe", "llama")
    with pytest.raises(SettingError, match=r"compute=0.1: must be at least 0\.\d+: .*16 channels.*64 channels"):
        freeze(adapted.model, 0.1)


def test_biases_are_kept_where_the_family_has_room_for_them():
    adapted = fitted("dynamoe", "llama")
    config, state = freeze(adapted.model, 0.99)
    assert config.mlp_bias is True
    own = adapted.model.base_model.layers[0].mlp.downs[-1]
    assert torch.equal(state["model.layers.0.mlp.down_proj.bias"], own.bias)
    assert not state["model.layers.0.mlp.gate_proj.bias"].any()
    with pytest.raises(SettingError, match="refit_bias=false"):
        freeze(fitted("dynamoe", "qwen3").model, 0.99)
