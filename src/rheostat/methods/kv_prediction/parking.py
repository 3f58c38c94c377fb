"""An auxiliary's weights in a mapped file: between prompts the process need not hold them in memory.

The parameters stay what they are, valid at any time and writable; a page that was given back is read again when it is
touched, from the system's cache or from the disk.
"""

from __future__ import annotations

import mmap
import tempfile

import torch
from torch import nn

from rheostat.errors import bad_setting

ALIGNMENT = 64
"""Of each tensor in the file, in bytes."""


class Parking:
    """Moves a module's parameters into a file without a name, which goes when nothing refers to them any more."""

    @torch.no_grad()
    def __init__(self, module: nn.Module) -> None:
        """
        Raises:
            SettingError: the module is not in the processor's memory.
        """
        tensors = list(module.parameters())
        if any(one.device.type != "cpu" for one in tensors):
            raise bad_setting("kv_prediction.keep_auxiliary", False, "true where the model is not in the CPU's memory")
        sizes = [-(-one.nbytes // ALIGNMENT) * ALIGNMENT for one in tensors]
        with tempfile.TemporaryFile() as file:
            file.truncate(max(sum(sizes), ALIGNMENT))
            self._memory = mmap.mmap(file.fileno(), 0)
        offset = 0
        for one, size in zip(tensors, sizes, strict=True):
            place = torch.frombuffer(self._memory, dtype=one.dtype, count=one.numel(), offset=offset).view(one.shape)
            one.data = place.copy_(one)
            offset += size

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of the module has weights of its own, in memory."""
        return type(None), ()

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self._memory)

    def release(self) -> None:
        """Give the memory back for now."""
        self._memory.madvise(mmap.MADV_DONTNEED)
