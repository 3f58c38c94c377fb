"""A hierarchical cache for our own runtime: an old body in two nibble planes, and a buffer in full precision.

The rules are those of `caches.hierarchical` (a row of n tokens has `body_length(n)` of them in the body), the numbers
those of `caches.planes`; only the layout differs: blocks of one group of tokens each, in the order in which
`kernels/native/planes.h` multiplies them. A layout of its own, because what a kernel reads must lie side by side.
"""

from __future__ import annotations

import torch

from rheostat.caches import planes
from rheostat.caches.counting import body_length
from rheostat.errors import SettingError, bad_setting
from rheostat.kernels import library
from rheostat.kernels.memory import zeros
from rheostat.kernels.settling import can_settle, settle
from rheostat.runtime.building import Unsupported
from rheostat.runtime.cache import KVCache
from rheostat.runtime.weights import CacheForm, DecoderWeights

LANES = 16
"""Tokens (of keys) and channels (of values) side by side; blocks are rounded up to them."""

SPARE = 16
"""Slots of the buffer beyond 2G, for drafted tokens; it grows when a draft is longer."""


AT_ONCE = 1 << 18
"""Numbers that are quantised together at most: what is between is several times as large, and a flush of one group has
few numbers in many layers, so that one layer at a time it would be calls of torch and nothing else."""


class PlaneBody:
    """The quantised tokens of L layers and B rows."""

    def __init__(
        self, shape: tuple[int, int, int, int], group_size: int, value_group_size: int, dtype: torch.dtype, groups: int
    ) -> None:
        """An empty body with room for `groups` groups a row.

        Args:
            shape: (L, B, K, d).

        Raises:
            SettingError: these groups do not fit the heads, or not the kernels.
        """
        check_groups(value_group_size, shape[3])
        self.shape, self.group_size, self.value_group_size = shape, group_size, value_group_size
        self.dtype, self.bits = dtype, 8
        tokens, width = _padded(group_size), _padded(shape[3])
        parts = shape[3] // value_group_size
        self.upper, self.lower, self.scales = (
            zeros((*shape[:3], groups, size), kind)
            for size, kind in (
                (tokens * width, torch.uint8),
                (tokens * width, torch.uint8),
                (2 * shape[3] + 2 * parts * tokens, dtype),
            )
        )
        """[L, B, K, groups, a block]: upper nibbles, lower nibbles, scales and zeros."""
        self.groups = torch.zeros(shape[1], dtype=torch.int32)
        """[B], groups that each row has."""

    @property
    def lengths(self) -> torch.Tensor:
        """[B] int32, tokens of each row."""
        return self.groups * self.group_size

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.upper.nbytes + self.lower.nbytes + self.scales.nbytes

    def read_bytes(self, bits: int) -> int:
        """Bytes that one pass reads of all layers and rows, as `bits` bits."""
        layers, _, heads, _ = self.shape
        block = self.upper.shape[4] * (bits // 4) + self.scales.shape[4] * self.scales.element_size()
        return layers * heads * int(self.groups.sum()) * block

    def append(self, row: int, keys: torch.Tensor, values: torch.Tensor, num_tokens: int) -> None:
        """Quantise the first `num_tokens` of these [L, K, n, d], whole groups, and put them behind what a row has; the
        tokens after them move to the front."""
        start, more = int(self.groups[row]), num_tokens // self.group_size
        if start + more > self.upper.shape[3]:
            self._grow(max(start + more, 2 * self.upper.shape[3]))
        if (code := library()) is not None and can_settle(self, keys, values):
            settle(code, self, row, keys, values, num_tokens)
        else:
            self._put(row, keys[:, :, :num_tokens], values[:, :, :num_tokens])
            for one in (keys, values):
                one[:, :, : one.shape[2] - num_tokens] = one[:, :, num_tokens:].clone()
        self.groups[row] += more

    def _put(self, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Quantise groups and put them behind what a row has: the plain twin of `kernels.settling`."""
        start, (layers, heads, num, dim) = int(self.groups[row]), keys.shape
        places = slice(start, start + num // self.group_size)
        several = max(1, AT_ONCE // (heads * num * dim))
        for first in range(0, layers, several):
            here = slice(first, first + several)
            parts = (one[here].flatten(0, 1) for one in (keys, values))  # [l K, n, d]
            for target, block in zip((self.upper, self.lower, self.scales), self._blocks(*parts), strict=True):
                target[here, row, :, places] = block.unflatten(0, (-1, heads))

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        self.upper, self.lower, self.scales = (one[:, rows] for one in (self.upper, self.lower, self.scales))
        self.groups = self.groups[rows]
        self.shape = (self.shape[0], len(rows), *self.shape[2:])

    def read(self, layer: int, row: int, bits: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [K, n, d] of a row as a pass sees them: the plain twin of the kernel's reading."""
        _, _, heads, dim = self.shape
        bits, count, size = bits or self.bits, int(self.groups[row]), self.group_size
        tokens, width = _padded(size), _padded(dim)
        upper, lower = (one[layer, row, :, :count] for one in (self.upper, self.lower))  # [K, n / G, bytes]
        half = tokens * width // 2
        scales = self.scales[layer, row, :, :count]
        out = []
        for part in (slice(0, half), slice(half, None)):
            is_key = part.start == 0
            unlay = _unlay_keys if is_key else _unlay_values
            codes = [unlay(one[..., part], tokens, width)[:, :, :size, :dim].flatten(1, 2) for one in (upper, lower)]
            spread = self._spread_keys if is_key else self._spread_values
            scale, zero = spread(scales)
            packed = [planes.pack(one) for one in codes]
            axis, group = (-2, size) if is_key else (-1, self.value_group_size)
            out.append(planes.dequantise(planes.Planes(packed[0], packed[1], scale, zero), axis, group, bits))
        return out[0].view(heads, -1, dim), out[1].view(heads, -1, dim)

    # -- layout

    def _blocks(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Upper bytes, lower bytes, scales [K, n / G, ...] of keys and values [K, n, d] of some layers' heads."""
        size, dim = self.group_size, keys.shape[2]
        num, tokens, width = keys.shape[1] // size, _padded(size), _padded(dim)
        key = planes.quantise(keys.to(self.dtype), -2, size)
        value = planes.quantise(values.to(self.dtype), -1, self.value_group_size)
        rows = []
        for one, other in ((key.upper, value.upper), (key.lower, value.lower)):
            assert one is not None
            assert other is not None
            codes = []
            for packed, lay in ((one, _lay_keys), (other, _lay_values)):
                nibbles = planes.unpack(packed).unflatten(1, (num, size))  # [K, n / G, G, d]
                codes.append(lay(torch.nn.functional.pad(nibbles, (0, width - dim, 0, tokens - size))))
            rows.append(torch.cat(codes, -1))
        spread = [one.unflatten(1, (num, size)).transpose(2, 3) for one in (value.scale, value.zero)]
        spread = [torch.nn.functional.pad(one, (0, tokens - size)).flatten(2) for one in spread]
        return rows[0], rows[1], torch.cat([key.scale, key.zero, *spread], -1)

    def _spread_keys(self, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dim = self.shape[3]
        return scales[..., :dim], scales[..., dim : 2 * dim]  # [K, n / G, d]

    def _spread_values(self, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, parts = _padded(self.group_size), self.shape[3] // self.value_group_size
        both = scales[..., 2 * self.shape[3] :].unflatten(-1, (2, parts, tokens))[..., : self.group_size]
        both = both.permute(2, 0, 1, 4, 3)
        return both[0].flatten(1, 2), both[1].flatten(1, 2)  # [K, n, parts]

    def _grow(self, groups: int) -> None:
        for name in ("upper", "lower", "scales"):
            old = getattr(self, name)
            new = zeros((*old.shape[:3], groups, old.shape[4]), old.dtype)
            new[:, :, :, : old.shape[3]] = old
            setattr(self, name, new)


class PlaneCache(KVCache):
    """Keys and values of which only the newest are in full precision: `keys`, `values`, `lengths` are the buffer."""

    body: PlaneBody

    def __init__(
        self,
        *,
        num_layers: int,
        num_rows: int,
        num_kv_heads: int,
        head_dim: int,
        group_size: int,
        value_group_size: int = 0,
        num_tokens: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Empty.

        Args:
            group_size: G, tokens of a key group.
            value_group_size: channels of a value group; 0 is the whole head.
            num_tokens: tokens a row to have room for.
        """
        super().__init__(
            num_layers=num_layers,
            num_rows=num_rows,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_slots=2 * group_size + SPARE,
            dtype=dtype,
        )
        shape, groups = (num_layers, num_rows, num_kv_heads, head_dim), -(-num_tokens // group_size)
        self.body = PlaneBody(shape, group_size, value_group_size or head_dim, dtype, groups)

    @classmethod
    def of(cls, cache: KVCache, group_size: int, value_group_size: int = 0, num_tokens: int = 0) -> PlaneCache:
        """A cache that holds what `cache` does, of which it keeps nothing."""
        layers, rows, heads, _, width = cache.keys.shape
        new = cls(
            num_layers=layers,
            num_rows=rows,
            num_kv_heads=heads,
            head_dim=width,
            group_size=group_size,
            value_group_size=value_group_size,
            num_tokens=max(num_tokens, int((cache.lengths - cache.starts).max())),
            dtype=cache.dtype,
        )
        for row, (start, stop) in enumerate(zip(cache.starts.tolist(), cache.lengths.tolist(), strict=True)):
            middle = start + body_length(stop - start, group_size)
            if middle > start:
                keys, values = (one[:, row, :, start:middle] for one in (cache.keys, cache.values))
                new.body.append(row, keys, values, middle - start)
            new.keys[:, row, :, : stop - middle] = cache.keys[:, row, :, middle:stop]
            new.values[:, row, :, : stop - middle] = cache.values[:, row, :, middle:stop]
            new.lengths[row] = stop - middle
        return new

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return super().nbytes + self.body.nbytes

    @property
    def num_tokens(self) -> torch.Tensor:
        """[B], tokens of each row."""
        return self.body.lengths + self.lengths

    def room(self) -> list[int]:
        """Tokens of each row that may come after the next one before the body grows."""
        return [2 * self.body.group_size - 1 - n for n in self.lengths.tolist()]

    def settle(self) -> None:
        """Move to the body what belongs there. Tokens that came before cannot be taken back then."""
        size = self.body.group_size
        for row, n in enumerate(self.lengths.tolist()):
            if n < 2 * size:
                continue
            more = n - n % size - size
            self.body.append(row, self.keys[:, row, :, :n], self.values[:, row, :, :n], more)
            self.lengths[row] = n - more

    def contents(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values [B, K, S, d] of all tokens as a pass sees them, from slot 0, and how many each row has in
        the body [B]: slot s of the buffer is column body + s."""
        bodies = self.body.lengths
        sides = []
        for which, buffer in enumerate((self.keys[layer], self.values[layer])):
            rows = [self.body.read(layer, row)[which].to(buffer.dtype) for row in range(self.num_rows)]
            whole = buffer.new_zeros(*buffer.shape[:2], int(bodies.max()) + buffer.shape[2], buffer.shape[3])
            for row, (old, n) in enumerate(zip(rows, bodies.tolist(), strict=True)):
                whole[row, :, :n] = old
                whole[row, :, n : n + buffer.shape[2]] = buffer[row]
            sides.append(whole)
        return sides[0], sides[1], bodies


def check_groups(value_group_size: int, head_dim: int) -> None:
    """Refuse value groups that the kernels cannot read.

    Raises:
        SettingError: they are neither the whole head nor multiples of 16 that divide it.
    """
    if value_group_size != head_dim and (value_group_size % LANES or head_dim % value_group_size):
        raise bad_setting("value_group_size", value_group_size, f"{head_dim}, or a multiple of {LANES} that divides it")


def check_planes(form: CacheForm, weights: DecoderWeights) -> None:
    """Refuse a cache form that cannot be kept for a model.

    Raises:
        Unsupported: layers with a window, or groups that the kernels cannot read.
    """
    if any(layer.window for layer in weights.layers):
        raise Unsupported("a cache in planes with layers that attend to a window")
    try:
        check_groups(form.value_group_size or weights.head_dim, weights.head_dim)
    except SettingError as error:
        raise Unsupported(f"such a cache ({error})") from None


def _padded(n: int) -> int:
    return -(-n // LANES) * LANES


def _lay_keys(codes: torch.Tensor) -> torch.Tensor:
    """Nibbles [..., G', d'] -> bytes [..., G' d' / 2] in the order [G' / 16][d' / 8][16 tokens][4]."""
    tiles = codes.unflatten(-1, (-1, 2, 4)).unflatten(-4, (-1, LANES))  # [..., G'/16, 16, d'/8, 2, 4]
    both = tiles[..., 0, :] | tiles[..., 1, :] << 4  # [..., G'/16, 16, d'/8, 4]
    return both.transpose(-3, -2).flatten(-4)


def _lay_values(codes: torch.Tensor) -> torch.Tensor:
    """Nibbles [..., G', d'] -> bytes [..., d' G' / 2] in the order [d' / 16][G' / 8][16 channels][4]."""
    return _lay_keys(codes.transpose(-1, -2))


def _unlay_keys(packed: torch.Tensor, tokens: int, width: int) -> torch.Tensor:
    """The inverse of `_lay_keys`: [..., G', d']."""
    both = packed.unflatten(-1, (tokens // LANES, width // 8, LANES, 4)).transpose(-3, -2)
    return torch.stack([both & 15, both >> 4], -2).flatten(-3).flatten(-3, -2)


def _unlay_values(packed: torch.Tensor, tokens: int, width: int) -> torch.Tensor:
    return _unlay_keys(packed, width, tokens).transpose(-1, -2)
