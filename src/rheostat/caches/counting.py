"""How a hierarchical cache divides a row's tokens, and what reading them costs. Integers in, integers out."""

from __future__ import annotations

from rheostat.errors import bad_setting


def body_length(num_tokens: int, group_size: int) -> int:
    """How many of a row's tokens are in the body."""
    return num_tokens - group_size - num_tokens % group_size if num_tokens >= 2 * group_size else 0


def saved_bytes(
    body: int, num_heads: int, head_dim: int, group_sizes: tuple[int, int], bits: int, itemsize: int
) -> int:
    """Full-precision bytes of `body` tokens of one row and layer, less what reading `bits` bits of them takes."""
    numbers = num_heads * head_dim * body  # of keys; as many of values
    scales = numbers // group_sizes[0] + numbers // group_sizes[1]
    return 2 * numbers * itemsize - 2 * numbers * bits // 8 - 2 * scales * itemsize


def check_groups(group_size: int, value_group_size: int, head_dim: int = 0, name: str = "") -> None:
    """Refuse group sizes that cannot be, for heads of any width where none is given.

    Raises:
        SettingError: naming the setting, behind `name` if given.
    """
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise bad_setting(f"{name}group_size", group_size, "an integer of at least 1")
    if isinstance(value_group_size, bool) or not isinstance(value_group_size, int) or value_group_size < 0:
        raise bad_setting(f"{name}value_group_size", value_group_size, "0 (the whole head) or a number of channels")
    if head_dim % 2:
        raise bad_setting("head_dim", head_dim, "even: two nibbles share a byte")
    if value_group_size and head_dim % value_group_size:
        raise bad_setting(f"{name}value_group_size", value_group_size, f"a divisor of the head width, {head_dim}")
