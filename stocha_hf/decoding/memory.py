"""Asking the system about the memory of weights: larger pages for those that are read, none for those that are not.

A row that is read alone costs a search for its address, which takes as long as its bytes do. With pages of 2 MB there
are few searches. The system lays pages together where the weights are not a file's. So matrices whose rows are read
here and there are copied out of files; the file's pages go.

transformers maps safetensors files into memory. MADV_PAGEOUT takes clean pages of a mapping out without losing
anything: who reads them reads the file again.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from pathlib import Path

import torch

MADV_COLLAPSE = 25  # Linux 6.1; older ones answer EINVAL, and so do all for a file
LARGE_PAGE = 2**21
LEAST = 2**18  # bytes of a tensor that are worth it
MADV_PAGEOUT = 21  # Linux 5.4; older ones answer EINVAL, which leaves the pages where they are
SHARED = ("/dev/shm/", "/memfd:")  # memory that other processes may read, and no file's
_LOCK = threading.Lock()


def use_large_pages(tensor: torch.Tensor) -> None:
    """Lay a tensor's pages together, with what shares its first and last one; nothing happens where that cannot be."""
    if sys.platform != "linux" or not tensor.is_cpu or tensor.nbytes < LEAST:
        return
    start = tensor.data_ptr() // LARGE_PAGE * LARGE_PAGE
    size = -(-(tensor.data_ptr() + tensor.nbytes - start) // LARGE_PAGE) * LARGE_PAGE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_COLLAPSE)


def use_own_large_pages(tensor: torch.Tensor) -> None:
    """Do the same to a tensor that a file may hold: the tensor then has memory of its own, with the same contents."""
    if sys.platform == "linux" and tensor.is_cpu and tensor.nbytes >= LEAST:
        with _LOCK:  # once: another thread may read the new memory already
            if _is_of_file(tensor.data_ptr()):
                before = tensor.data
                with torch.inference_mode(False):
                    tensor.data = before.clone()
                release(before)
    use_large_pages(tensor)


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
        span, _, _, _, inode, *path = line.split(maxsplit=5)
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return inode != "0" and not "".join(path).startswith(SHARED)
    return False
