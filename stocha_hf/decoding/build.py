"""Compiling cpp/kernels.cpp: with the system's C++ compiler at the first use, for this processor, then cached.

The shared library has a plain C interface and no torch in it, so it builds in seconds, works with any torch and needs
no torch when stocha_hf is installed. It lies in ~/.cache/stocha_hf (or $XDG_CACHE_HOME/stocha_hf), named by a hash of
source, flags, compiler and processor. Its OpenMP symbols are left open and found in the runtime that torch loaded: two
runtimes would fight for the cores.

Loading a library runs it, so nothing is loaded that another user could have put there: the folder and the library are
ours and closed to others, or the kernels are compiled into a private temporary folder instead. A library ends with the
SHA-256 of what stands before. A truncated or foreign file does not, and is compiled again. Processes that build at
once each write a file of their own and rename it.

    kernels()  # a ctypes.CDLL, or None after one warning that names the cause
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - loads the OpenMP runtime with global symbols

SOURCE = Path(__file__).with_name("cpp") / "kernels.cpp"  # and the headers beside it
FLAGS = ("-O3", "-march=native", "-std=gnu++17", "-fPIC", "-fopenmp", "-fvisibility=hidden")
TIMEOUT = 300  # seconds
_INT, _POINTER, _SIZE = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
FUNCTIONS: dict[str, tuple[list[Any], Any]] = {  # of cpp/kernels.cpp: argument types, type of the result
    "stocha_ffn": ([_POINTER, _INT, _POINTER, _POINTER, _SIZE, _INT], _SIZE),
    "stocha_linear": ([_POINTER, _INT, _POINTER, _POINTER, _SIZE, _INT], None),
    "stocha_step": ([_POINTER, _POINTER, _INT], None),
    "stocha_dequantize": ([_POINTER, _SIZE, _SIZE, _SIZE, _INT, _POINTER, _INT], None),
    "stocha_turn": ([_POINTER, _POINTER, _INT], None),
    "stocha_same": ([_POINTER, _POINTER, _SIZE, _SIZE, _SIZE], _INT),
    "stocha_read": ([_POINTER, _SIZE, _INT], _SIZE),
}
_LOCK = threading.Lock()
_LOG = logging.getLogger(__name__)


def kernels() -> ctypes.CDLL | None:
    """Return the loaded kernels, or None where they cannot be built, which is warned of once."""
    with _LOCK:
        return _kernels()


@functools.cache
def _kernels() -> ctypes.CDLL | None:
    try:
        return load()
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        cause = next((line for line in output.splitlines() if "error" in line), output.strip())
        warnings.warn(
            f"stocha_hf's sparse kernels cannot be built, so decoding falls back to PyTorch's operations: {cause}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def load(flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    """Load the library that these flags make, compiled first if the cache lacks it.

    Raises:
        OSError: there is no compiler, or no place for the library.
        SubprocessError: compiling failed.
    """
    compiler = _compiler()
    try:
        return _with_types(ctypes.CDLL(str(_cached(compiler, flags))))
    except PermissionError as error:
        _LOG.warning("%s; stocha_hf's sparse kernels are compiled for this process alone (10 seconds)", error)
    with tempfile.TemporaryDirectory(prefix="stocha_hf-") as folder:  # mode 0700; a loaded library outlives its file
        return _with_types(ctypes.CDLL(str(_build(compiler, flags, Path(folder), "kernels.so"))))


def _compiler() -> list[str]:
    """The compiler's command: what CXX names, which may have options, or the system's."""
    named = shlex.split(os.environ.get("CXX", ""))
    if not named:
        named = next(([name] for name in ("g++", "c++") if shutil.which(name)), [])
    found = shutil.which(named[0]) if named else None
    if found is None:
        raise FileNotFoundError(
            f"CXX names {named[0]}, which is not there" if named else "no C++ compiler found: expected g++"
        )
    return [found, *named[1:]]


def _cached(compiler: list[str], flags: tuple[str, ...]) -> Path:
    """The library in the user's cache, built if it is not there or not whole.

    Raises PermissionError where the cache cannot be written or is not ours alone.
    """
    folder = _private_folder()
    library = folder / f"kernels-{_key(compiler, flags)}.so"
    if library.exists() and not _is_whole(library):
        _LOG.warning("%s is truncated, or not what stocha_hf built: it is compiled again", library)
        library.unlink()
    if not library.exists():
        _LOG.warning("Building stocha_hf's sparse kernels, once for this machine (10 seconds)")
        with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as work:
            os.replace(_build(compiler, flags, Path(work), library.name), library)  # who comes second replaces it
    return library


def _private_folder() -> Path:
    """The cache folder, made if it is not there. Raises PermissionError unless only we can write there."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        folder = home.expanduser() / "stocha_hf"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_ours(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} cannot be written")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise PermissionError(str(error)) from None
    return folder


def _check_ours(path: Path) -> None:
    """Raise PermissionError where another user owns a path or may write to it. Links are not followed."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(f"{path} is a link or belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} can be written by other users; close it with chmod go-w")


def _is_whole(library: Path) -> bool:
    """Whether a file is a library that `_build` finished. Raises PermissionError where it may be another user's."""
    _check_ours(library)
    content = library.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _build(compiler: list[str], flags: tuple[str, ...], folder: Path, name: str) -> Path:
    """Compile the library into a folder, and end it with its hash, which a loader does not read."""
    parts, library = folder / "kernels.o", folder / name
    _run(*compiler, *flags, "-c", str(SOURCE), "-o", str(parts))
    _run(*compiler, "-shared", str(parts), "-o", str(library))  # without -fopenmp, which would name a runtime
    content = library.read_bytes()
    library.write_bytes(content + hashlib.sha256(content).digest())
    library.chmod(0o700)
    return library


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT)


def _key(compiler: list[str], flags: tuple[str, ...]) -> str:
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, timeout=TIMEOUT).stdout
    sources = [path.read_bytes() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    parts = [b"2", *sources, repr((*compiler, *flags)).encode(), version, _processor().encode()]  # 2: with a hash
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on: home folders are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return platform.machine() + "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))


def _with_types(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the argument types of its functions declared."""
    for name, (arguments, result) in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library
