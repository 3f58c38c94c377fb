"""Memory on huge pages, for what is streamed: a miss of the page table costs more than the line that was wanted.

Weights of a small model are many pieces below the size of a huge page, so they are laid side by side in slabs.
"""

from __future__ import annotations

import mmap
import threading
from contextlib import suppress

import torch

HUGE_PAGE = 2 << 20

SLAB = 16 << 20
"""Bytes of memory that small pieces are cut from. It is given back when the last of its pieces is."""

LINE = 64
"""Bytes; where each piece begins."""

_lock = threading.Lock()
_slab = torch.empty(0, dtype=torch.uint8)
"""What is left of the newest slab."""


def aligned_bytes(num_bytes: int) -> torch.Tensor:
    """Fresh memory [num_bytes] uint8, on huge pages where the system gives them."""
    global _slab
    if num_bytes > SLAB // 4:  # begins a page of its own
        return _zeroed(num_bytes)
    wanted = -(-num_bytes // LINE) * LINE
    with _lock:
        if wanted > len(_slab):
            _slab = _zeroed(SLAB)
        piece, _slab = _slab[:num_bytes], _slab[wanted:]
    return piece


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros, which take memory only once they are touched; large ones are on huge pages where the system gives them."""
    num_bytes = dtype.itemsize
    for size in shape:
        num_bytes *= size
    if num_bytes < HUGE_PAGE:
        return torch.zeros(shape, dtype=dtype)
    return _zeroed(num_bytes).view(dtype).view(shape)


def _zeroed(num_bytes: int) -> torch.Tensor:
    """[num_bytes] uint8 of the system's own zero pages."""
    with torch.inference_mode(False):  # a slab outlives the mode in which it was asked for
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.zeros(num_bytes, dtype=torch.uint8)
        pages = mmap.mmap(-1, num_bytes + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # only advice: a kernel without huge pages loses nothing but speed
            pages.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(pages, dtype=torch.uint8)  # which keeps `pages`
        skip = -whole.data_ptr() % HUGE_PAGE
        return whole[skip : skip + num_bytes]
