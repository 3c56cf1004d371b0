"""Compiling kernels.cpp: with the system's C++ compiler at the first use, for this machine's processor, then cached.

The shared library has a plain C interface and no torch in it, so it builds in seconds, works with any torch and needs
no torch when stocha_hf is installed. It lies in ~/.cache/stocha_hf (or $XDG_CACHE_HOME/stocha_hf), named by a hash of
source, flags, compiler and processor; two processes may build it at once. Its OpenMP symbols are left open and found
in the runtime that torch loaded: two runtimes would fight for the cores.

    kernels()  # a ctypes.CDLL, or None after one warning that names the cause
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path

import torch  # noqa: F401 - loads the OpenMP runtime with global symbols

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=gnu++17", "-fPIC", "-fopenmp")
TIMEOUT = 300  # seconds
_LOCK = threading.Lock()


def kernels() -> ctypes.CDLL | None:
    """The loaded kernels; None where they cannot be built, which is warned of once."""
    with _LOCK:
        return _kernels()


@functools.cache
def _kernels() -> ctypes.CDLL | None:
    try:
        return with_types(ctypes.CDLL(str(compiled())))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        cause = next((line for line in said.splitlines() if "error" in line), said.strip())
        warnings.warn(
            f"stocha_hf's sparse kernels cannot be built, so decoding falls back to PyTorch's operations: {cause}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def compiled(flags: tuple[str, ...] = FLAGS) -> Path:
    """The shared library, built if the cache lacks it. Raises OSError or SubprocessError."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found: expected g++, or one named by CXX")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stocha_hf"
    library = folder / f"kernels-{_key(compiler, flags)}.so"
    if not library.exists():
        logging.getLogger(__name__).warning("Building stocha_hf's sparse kernels, once for this machine (10 seconds)")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as work:
            parts = [str(Path(work) / name) for name in ("kernels.o", "kernels.so")]
            _run(compiler, *flags, "-c", str(SOURCE), "-o", parts[0])
            _run(compiler, "-shared", parts[0], "-o", parts[1])  # without -fopenmp, which would name a runtime
            os.replace(parts[1], library)  # whoever comes second replaces it by the same
    return library


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT)


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=TIMEOUT).stdout
    told = [SOURCE.read_bytes(), repr(flags).encode(), version, _processor().encode()]
    return hashlib.sha256(b"\0".join(told)).hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on: home folders are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return platform.machine() + "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))


def with_types(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the argument types of its functions declared."""
    integer, pointer, size, real = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    types = {
        "stocha_ffn": ([integer, *[pointer] * 7, *[size] * 3, integer, real, real, integer], size),
        "stocha_linear": ([integer, *[pointer] * 4, *[size] * 3, integer], None),
        "stocha_qkv": ([integer, *[pointer] * 15, *[size] * 5, real, integer], None),
        "stocha_layer": ([integer, *[pointer] * 13, *[size] * 11, integer, *[real] * 4, integer], None),
        "stocha_same": ([pointer, pointer, size, size, size], integer),
        "stocha_read": ([pointer, size, integer], size),
    }
    for name, (arguments, result) in types.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library
