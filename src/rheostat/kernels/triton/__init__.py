"""Triton twins of the kernels, for NVIDIA GPUs. Optional: `pip install 'rheostat[gpu]'`.

Nothing else in rheostat imports this package before a tensor on a GPU asks for it. Under `TRITON_INTERPRET=1` it runs
on CPU tensors, slowly, which is how it is tested where there is no GPU.
"""

from __future__ import annotations

from rheostat.kernels.triton.attention import decode_attention
from rheostat.kernels.triton.ffn import NestedWeights, nested_ffn
from rheostat.kernels.triton.language import check_device, is_available
from rheostat.kernels.triton.matrix import DeviceMatrix, pack
from rheostat.kernels.triton.planes import NibbleBody, bytes_read, planes_attention
from rheostat.kernels.triton.products import few_rows

__all__ = [
    "DeviceMatrix",
    "NestedWeights",
    "NibbleBody",
    "bytes_read",
    "check_device",
    "decode_attention",
    "few_rows",
    "is_available",
    "nested_ffn",
    "pack",
    "planes_attention",
]
