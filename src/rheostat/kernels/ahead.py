"""Reading prompts ahead in one native call: the first layers run, and the others' keys and values predicted."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from rheostat.errors import bad_setting
from rheostat.kernels import structs
from rheostat.kernels.packed import CMatrix, PackedMatrix, pack
from rheostat.kernels.reader import NativeReader


class NativeAhead:
    """One depth's layers and maps; its plain twin is the rest of `rheostat.runtime.ahead.read_ahead`.

    Several threads may call it at once, each with a cache of its own.
    """

    def __init__(self, reader: NativeReader, maps: Any) -> None:
        """Describe the maps to the native code; packed once, in bfloat16.

        Args:
            reader: of all the decoder's layers.
            maps: a `rheostat.runtime.weights.PredictedLayers`, of all layers from its depth on.

        Raises:
            SettingError: the maps are not those of the decoder.
        """
        self._reader, self._keep, self._depth = reader, structs.Keep(), maps.depth
        self.squeeze = None if maps.squeeze is None else pack(maps.squeeze, "bf16")
        self.maps = pack(torch.cat(list(maps.maps)), "bf16")
        bias, firsts = (torch.cat([one.detach().float() for one in part]) for part in (maps.biases, maps.firsts))
        self._check(maps.reads, maps.previous, bias, firsts)
        taps = sorted((layer, column) for column, layer in enumerate((*maps.reads, *maps.previous)))
        self._fixed = {
            "reads": self._keep.array(ctypes.c_int32, [layer for layer, _ in taps]),
            "columns": self._keep.array(ctypes.c_int32, [column for _, column in taps]),
            "is_other": self._keep.array(ctypes.c_int32, [int(column >= len(maps.reads)) for _, column in taps]),
            "bias": self._keep.floats(bias),
            "firsts": self._keep.floats(firsts),
            "squeeze": CMatrix() if self.squeeze is None else self._keep.matrix(self.squeeze),
            "maps": self._keep.matrix(self.maps),
            "num_reads": len(taps),
            "has_squeeze": int(self.squeeze is not None),
        }

    @property
    def matrices(self) -> tuple[PackedMatrix, ...]:
        """All that a token is multiplied with."""
        return (self.maps,) if self.squeeze is None else (self.squeeze, self.maps)

    def __call__(
        self,
        h: torch.Tensor,
        prompt: Any,
        is_early: torch.Tensor,
        others: torch.Tensor,
        cache: Any,
        settings: torch.Tensor | None,
        rope: Any,
    ) -> list[torch.Tensor] | None:
        """Fill the cache with a prompt: all its tokens below the depth, the early ones above it too.

        Args:
            h: [N, D] float32, what enters the first layer; afterwards what enters the depth.
            prompt: a `rheostat.runtime.prefill.Prompt`.
            is_early: [N] bool, the tokens that are predicted.
            others: [N], the place of the token before each (`rheostat.runtime.ahead.before`).
            cache, settings, rope: as for `NativeReader`.

        Returns:
            Experts [N] int64 of each routed layer below the depth; None where no router was asked.

        Raises:
            SettingError: the tokens do not fit the cache or the decoder.
        """
        call = self._reader.prepare(range(self._depth), h, prompt, cache, settings, rope)
        early, befores = is_early.to(torch.int32), others.to(torch.int32)
        ahead = structs.CPredicted(is_early=early.data_ptr(), others=befores.data_ptr(), **self._fixed)
        self._reader.library.rheostat_read_ahead(
            ctypes.byref(call.decoder), ctypes.byref(call.reading), ctypes.byref(ahead), torch.get_num_threads()
        )
        return call.chosen()

    def _check(
        self, reads: tuple[int, ...], previous: tuple[int, ...], bias: torch.Tensor, firsts: torch.Tensor
    ) -> None:
        layers, width, outputs = self._reader.sizes
        if not 1 <= self._depth < layers or any(not 0 <= one <= self._depth for one in (*reads, *previous)):
            raise bad_setting("reads", (reads, previous), f"layers up to the depth {self._depth} of {layers}")
        wanted = ((layers - self._depth) * outputs, (len(reads) + len(previous)) * width)
        inputs = self.matrices[0].shape[1]
        joined = self.squeeze is None or self.squeeze.shape[0] == self.maps.shape[1]
        if (self.maps.shape[0], inputs) != wanted or not joined or not wanted[0] == len(bias) == len(firsts):
            raise bad_setting("maps", [one.shape for one in self.matrices], f"from {wanted[1]} to {wanted[0]} numbers")
