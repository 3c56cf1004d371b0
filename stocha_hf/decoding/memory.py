"""Giving back the memory of weights of which a copy in another layout is read.

transformers maps safetensors files into memory. MADV_PAGEOUT takes clean pages of a mapping out without losing
anything: who reads them reads the file again.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import torch

MADV_PAGEOUT = 21  # Linux 5.4; older ones answer EINVAL, which leaves the pages where they are


def release(tensor: torch.Tensor) -> bool:
    """Take a tensor's pages out of memory if a file holds them; return whether that was done."""
    if sys.platform != "linux" or not tensor.is_cpu:
        return False
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if size <= 0 or not _is_of_file(start):
        return False
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_PAGEOUT) == 0


def _is_of_file(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode = line.split(maxsplit=5)[:5]
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return inode != "0"
    return False
