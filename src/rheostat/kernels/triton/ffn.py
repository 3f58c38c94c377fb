"""The nested FFN with a width for each token, on a GPU: y = down(act(gate x) * up x) over a prefix of the channels.

Up to 16 tokens go through `ffn_few`, more through `ffn_many`. Neither waits for the GPU, so both can be captured in a
graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rheostat.errors import bad_setting
from rheostat.kernels.structs import ACTIVATIONS
from rheostat.kernels.triton.ffn_few import FUSED, run_few
from rheostat.kernels.triton.ffn_launch import FFNTiles, table_of
from rheostat.kernels.triton.ffn_many import GROUPED, run_many
from rheostat.kernels.triton.language import DTYPES
from rheostat.kernels.triton.matrix import DeviceMatrix
from rheostat.kernels.triton.products import MOST_ROWS, check_rows


@dataclass(frozen=True, eq=False)
class NestedWeights:
    """An FFN ready for the kernels. It refers to the matrices' own memory: keep that where it is."""

    gate: DeviceMatrix
    up: DeviceMatrix
    downs: tuple[DeviceMatrix, ...]
    biases: tuple[torch.Tensor | None, ...]
    widths: tuple[int, ...]
    """Channels of each expert, rising; the last is F."""
    sizes: torch.Tensor
    """The same, [E] int64 on the device."""
    table: torch.Tensor
    """[downs, COLUMNS] int64 on the device."""

    @classmethod
    def of(
        cls,
        gate: DeviceMatrix,
        up: DeviceMatrix,
        downs: Sequence[DeviceMatrix],
        biases: Sequence[torch.Tensor | None],
        sizes: Sequence[int],
    ) -> NestedWeights:
        """See `nested_ffn` for the arguments.

        Raises:
            SettingError: shapes, formats, dtypes or devices do not fit.
        """
        _check_weights(gate, up, downs, biases, sizes)
        held = torch.tensor(tuple(sizes), device=gate.values.device), table_of(downs, biases)
        return cls(gate, up, tuple(downs), tuple(biases), tuple(sizes), *held)

    @property
    def hidden_size(self) -> int:
        """Outputs, which are as many as the inputs in a model."""
        return self.downs[0].shape[0]

    def bytes_of(self, experts: Sequence[int]) -> int:
        """Bytes of weights that a pass over few tokens reads: gate and up as far as the widest, and each down
        projection that is used as far as its widest."""
        used = sorted({e for e in experts if e >= 0})
        if not used:
            return 0
        size = self.widths[used[-1]]
        both = self.gate.bytes_of(num_rows=size) + self.up.bytes_of(num_rows=size)
        if len(self.downs) == 1:
            return both + self.downs[0].bytes_of(num_cols=size)
        return both + sum(self.downs[e].bytes_of() for e in used)

    def run(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        activation: str = "silu",
        tiles: FFNTiles | None = None,
    ) -> torch.Tensor:
        """Tokens x [M, D] through `experts` [M]: [M, D] in the dtype of x. Its arguments decide the tiles; without
        any, few tokens go through one kernel.

        Raises:
            SettingError: shapes, dtypes or devices do not fit. Experts are not looked at: -1 to E - 1.
        """
        check_rows(x, self.gate, "x")
        if activation not in ACTIVATIONS:
            raise bad_setting("activation", activation, f"one of {', '.join(ACTIVATIONS)}")
        if experts.shape != (len(x),) or experts.dtype not in (torch.int64, torch.int32) or experts.device != x.device:
            raise bad_setting(
                "experts", f"{experts.dtype} {tuple(experts.shape)}", f"whole numbers ({len(x)},) beside x"
            )
        if tiles is not None and not tiles.rows and len(x) > MOST_ROWS:
            raise bad_setting("tiles", "for few tokens", f"for many: there are {len(x)}")
        if not len(x) or not self.hidden_size:
            return x.new_empty(len(x), self.hidden_size)
        tiles = tiles or (GROUPED if len(x) > MOST_ROWS else FUSED)[0]
        run = run_many if tiles.rows else run_few
        return run(self, x, experts.contiguous(), activation, tiles)


def nested_ffn(
    x: torch.Tensor,
    gate: DeviceMatrix,
    up: DeviceMatrix,
    downs: Sequence[DeviceMatrix],
    biases: Sequence[torch.Tensor | None],
    sizes: Sequence[int],
    experts: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """A gated FFN whose experts are prefixes of its channels, width by row. `plain.nested_ffn` is its twin.

    To call it often, keep the `NestedWeights`: making them takes a copy to the GPU.

    Args:
        x: [M, D] float32, bfloat16 or float16; of any strides.
        gate, up: [F, D], of one format.
        downs: one [D, F], of which each expert takes its first columns; or one [D, sizes[e]] an expert.
        biases: [D] or None, of each of `downs`, of one dtype.
        sizes: channels of each expert, rising; the last is F.
        experts: [M] whole numbers; -1 gives zeros.
        activation: one of `structs.ACTIVATIONS`.

    Returns:
        [M, D] in the dtype of x; sums are float32.

    Raises:
        SettingError: shapes, formats, dtypes, devices or experts do not fit.
    """
    if len(experts) and not -1 <= int(experts.min()) <= int(experts.max()) < len(sizes):
        raise bad_setting("experts", experts.tolist(), f"from -1 to {len(sizes) - 1}")
    return NestedWeights.of(gate, up, downs, biases, sizes).run(x, experts, activation)


def _check_weights(
    gate: DeviceMatrix,
    up: DeviceMatrix,
    downs: Sequence[DeviceMatrix],
    biases: Sequence[torch.Tensor | None],
    sizes: Sequence[int],
) -> None:
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] != gate.shape[0]:
        raise bad_setting("sizes", tuple(sizes), f"rising, from at least 1 to {gate.shape[0]}")
    if up.shape != gate.shape or any((w.format, w.group) != (gate.format, gate.group) for w in (up, *downs)):
        raise bad_setting(
            "up, downs", [(w.shape, w.format) for w in (up, *downs)], f"as gate: {gate.shape} {gate.format}"
        )
    wanted = [sizes[-1]] if len(downs) == 1 else list(sizes)
    if [w.shape[1] for w in downs] != wanted or len({w.shape[0] for w in downs}) != 1:
        raise bad_setting("downs", [w.shape for w in downs], f"one with {sizes[-1]} inputs, or one an expert")
    given = [bias for bias in biases if bias is not None]
    is_right = len(biases) == len(downs) and len({bias.dtype for bias in given}) <= 1
    if not is_right or any(
        b.shape != (downs[0].shape[0],) or b.dtype not in DTYPES or b.stride() != (1,) for b in given
    ):
        raise bad_setting(
            "biases", [b if b is None else tuple(b.shape) for b in biases], "vectors of floats, one a down"
        )
    tensors = [one for w in (gate, up, *downs) for one in (w.values, w.scales, w.least) if one is not None]
    if len({one.device for one in (*tensors, *given)}) != 1:
        raise bad_setting("weights", "on several devices", "on one")
    if any(w.values.data_ptr() % 16 for w in downs):
        raise bad_setting("downs", "at an odd address", "memory that begins at a multiple of 16 bytes")
