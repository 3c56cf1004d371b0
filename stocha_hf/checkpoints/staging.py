"""An output folder that appears complete or not at all, and files copied at the speed of `cp`.

The folder is filled under a hidden name beside its destination and takes its place by one rename, so that a kill at
any moment leaves either no output or a whole one. A killed run's leftovers are removed by the next run on the same
output: each run holds a lock on its hidden folder, and a folder whose lock is free has no owner.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stocha_hf.errors import StochaError

_FICLONE = 0x40049409  # Linux ioctl: share the blocks of another file until one of the two is written
_BUFFER = 1 << 20  # bytes; larger buffers leave the processor's cache and are slower than cp


@contextmanager
def staged_folder(output: Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty hidden folder; when the body succeeds it becomes `output`, when it fails it vanishes.

    With `replace`, an existing `output` gives way at the last moment. Raises StochaError where nothing can be written.
    """
    output = Path(os.path.abspath(output))
    with scratch_folder(output) as partial:
        yield partial
        _open_to_readers(partial)
        _take_place(partial, output, replace)


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside `output`, which is removed afterwards unless it was renamed.

    Raises StochaError where it cannot be written; the next run on the same output removes what a killed one leaves.
    """
    output = Path(os.path.abspath(output))
    new_parents = [parent for parent in output.parents if not parent.exists()]
    partial = output.with_name(f".{output.name}.partial-{secrets.token_hex(4)}")
    lock = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(output)
        partial.mkdir()
        lock = try_lock(partial)
        yield partial
    except OSError as error:
        raise StochaError(_what_failed(error, output, partial)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        for parent in new_parents:
            with suppress(OSError):  # not empty: the output stands in it
                parent.rmdir()


def _what_failed(error: OSError, output: Path, partial: Path) -> str:
    """A sentence on an OSError of a body that reads sources and writes into `partial`."""
    reason, path = error.strerror or error, Path(str(error.filename or partial))
    if path == output or path in output.parents or path.is_relative_to(partial):
        return f"cannot write {output} ({reason}): free space or choose another folder"
    return f"cannot read {path} ({reason}): expected a file that stays as it is meanwhile"


def check_apart(output: Path, sources: Iterable[Path]) -> None:
    """Raise StochaError where replacing `output` would delete a source: it is one, lies in one, or holds one.

    Judged by real paths, so that no link hides it.
    """
    if not output.exists():
        return
    target = output.resolve()
    for source in sources:
        real = source.resolve()
        if target == real or target.is_relative_to(real) or real.is_relative_to(target):
            how = "is" if target == real else "lies in" if target.is_relative_to(real) else "holds"
            raise StochaError(
                f"{output} {how} the source {source}, which overwriting would delete: choose another output"
            )


def check_place(output: Path) -> None:
    """Raise StochaError where no folder `output` can be written, or made."""
    path = output.absolute()
    nearest = next(place for place in (path, *path.parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        where = "" if nearest == path else f" in {nearest}"
        raise StochaError(f"cannot write {output}{where}: expected a folder with write permission")


def _open_to_readers(folder: Path) -> None:
    """Give files the permissions that the folder has by the umask: safetensors writes some for their owner alone."""
    permissions = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | permissions)


def _take_place(partial: Path, output: Path, replace: bool) -> None:
    old = output.with_name(f"{partial.name}-old")
    if replace and output.exists():
        output.rename(old)
    try:
        partial.rename(output)
    except OSError as error:
        with suppress(FileNotFoundError):
            old.rename(output)
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise StochaError(
                f"another run wrote {output} meanwhile: choose another output or pass --overwrite"
            ) from error
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_orphans(output: Path) -> None:
    for orphan in output.parent.glob(f".{glob.escape(output.name)}.partial-*"):
        if not output.exists() and orphan.name.endswith("-old"):
            orphan.rename(output)  # killed between the two renames of a replacement
            continue
        with suppress(FileNotFoundError):  # another run swept it
            if (lock := try_lock(orphan)) is not None:
                shutil.rmtree(orphan, ignore_errors=True)
                os.close(lock)


def try_lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed or its process dies; None if it is held."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def copy_file(source: Path, target: Path, progress: Callable[[int], object] = lambda count: None) -> None:
    """Copy one file's bytes: shared blocks where the file system can (btrfs, xfs), else plain reads and writes.

    Never a hard link: a later save into the output folder would write through it into the source or the Hub cache.
    """
    target.parent.mkdir(exist_ok=True)
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
            progress(os.fstat(writer.fileno()).st_size)
        except OSError:
            buffer = memoryview(bytearray(_BUFFER))
            while count := reader.readinto(buffer):
                rest = buffer[:count]
                while rest:
                    rest = rest[writer.write(rest) :]
                progress(count)
