"""How a hierarchical cache divides a row: in whole groups, with the newest G to 2G - 1 tokens kept as they are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rheostat.caches.counting import body_length, check_groups, saved_bytes
from rheostat.errors import SettingError

groups = st.integers(1, 200)


@given(st.integers(0, 5000), groups)
def test_the_body_is_whole_groups_and_the_rest_a_buffer(num_tokens, group):
    body = body_length(num_tokens, group)
    assert body % group == 0
    if num_tokens < 2 * group:
        assert body == 0
    else:
        assert group <= num_tokens - body < 2 * group


@given(st.integers(0, 5000), groups)
def test_the_body_only_grows(num_tokens, group):
    assert body_length(num_tokens, group) <= body_length(num_tokens + 1, group)


@given(st.integers(0, 50), st.integers(1, 8), st.sampled_from([32, 64, 128]), st.sampled_from([2, 4]))
def test_bytes_saved_are_what_is_not_read(num_groups, heads, width, itemsize):
    """Counted here from what is stored: nibbles, and a scale and a least value of each group."""
    group, value_group = 64, 16
    tokens = num_groups * group
    for bits in (4, 8):
        values = heads * tokens * width
        stored = 2 * values * bits // 8
        stored += 2 * itemsize * heads * width * num_groups  # keys: of each channel of each group of tokens
        stored += 2 * itemsize * heads * tokens * (width // value_group)  # values: of each group of channels
        assert saved_bytes(tokens, heads, width, (group, value_group), bits, itemsize) == (
            2 * values * itemsize - stored
        )
    assert saved_bytes(tokens, heads, width, (group, value_group), 4, itemsize) >= saved_bytes(
        tokens, heads, width, (group, value_group), 8, itemsize
    )


@pytest.mark.parametrize(
    ("given_sizes", "message"),
    [
        ((0, 0), "group_size=0"),
        ((True, 0), "group_size=True"),
        ((2.0, 0), "group_size=2.0"),
        ((4, -1), "value_group_size=-1"),
        ((4, False), "value_group_size=False"),
        ((4, 0, 33), "head_dim=33"),
        ((4, 24, 64), "value_group_size=24"),
    ],
)
def test_groups_that_cannot_be_are_named(given_sizes, message):
    with pytest.raises(SettingError, match=message):
        check_groups(*given_sizes)
    with pytest.raises(SettingError, match=r"head_dim=|cache\.\w*group_size="):
        check_groups(*(given_sizes if len(given_sizes) > 2 else (*given_sizes, 0)), name="cache.")


def test_a_whole_head_is_always_a_group():
    for width in (2, 64, 98):
        check_groups(1, 0, width)
        check_groups(128, width, width)
