"""Pieces lie apart, side by side, on huge pages; zeros are zeros."""

from __future__ import annotations

import gc
import mmap
import weakref

import pytest
import torch

from rheostat.kernels import memory
from rheostat.kernels.memory import HUGE_PAGE, LINE, SLAB, aligned_bytes, zeros


def test_a_large_piece_begins_at_a_huge_page():
    piece = aligned_bytes(5 << 20)
    assert piece.data_ptr() % HUGE_PAGE == 0
    assert piece.nbytes == 5 << 20


def test_small_pieces_lie_side_by_side_and_apart():
    memory._slab = memory._slab[:0]
    sizes = [1, 64, 100, 700_000, 1_770_000]
    pieces = [aligned_bytes(size) for size in sizes]
    assert pieces[0].data_ptr() % HUGE_PAGE == 0
    for number, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
        assert piece.shape == (size,)
        assert piece.data_ptr() % LINE == 0
        piece.fill_(number + 1)
    assert [int(piece.min()) for piece in pieces] == [int(piece.max()) for piece in pieces] == [1, 2, 3, 4, 5]
    assert pieces[-1].data_ptr() - pieces[0].data_ptr() < SLAB


def test_a_slab_is_given_back_with_its_last_piece(monkeypatch):
    made = []

    class Pages(mmap.mmap):
        """One whose end can be seen."""

    def pages(*args):
        one = Pages(*args)
        made.append(weakref.ref(one))
        return one

    monkeypatch.setattr(memory.mmap, "mmap", pages)
    memory._slab = memory._slab[:0]
    pieces = [aligned_bytes(SLAB // 4) for _ in range(5)]  # the last one is in a new slab
    assert len(made) == 2
    del pieces[1:4]
    gc.collect()
    assert made[0]() is not None
    del pieces[0]
    gc.collect()
    assert made[0]() is None
    assert made[1]() is not None


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (3, 1 << 20), (2, 7, 300_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros(shape, dtype):
    found = zeros(shape, dtype)
    assert (found.shape, found.dtype, found.is_contiguous()) == (torch.Size(shape), dtype, True)
    assert not found.any()
    found.fill_(1)
    assert found.float().mean() == 1 or not found.numel()


def test_a_system_without_the_advice_gets_ordinary_memory(monkeypatch):
    monkeypatch.delattr(memory.mmap, "MADV_HUGEPAGE", raising=False)
    assert not zeros((3, 1 << 20), torch.float32).any()
    assert aligned_bytes(5 << 20).shape == (5 << 20,)


def test_a_slab_made_in_inference_mode_serves_outside_it():
    memory._slab = memory._slab[:0]
    with torch.inference_mode():
        small, large = aligned_bytes(64), aligned_bytes(SLAB)
    for piece in (small, large, aligned_bytes(64)):
        assert not piece.is_inference()
        piece.fill_(1)


def test_a_kernel_without_huge_pages_loses_nothing_but_speed(monkeypatch):
    class Pages(mmap.mmap):
        def madvise(self, *advice):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", Pages)
    piece = aligned_bytes(SLAB)
    assert piece.data_ptr() % HUGE_PAGE == 0
    assert int(piece.max()) == 0
