"""A refit's options, and the hidden folder beside the output where a refit or quantization keeps finished layers.

A killed run finds its layers there and goes on. The folder is locked by the run that writes it, so that a second refit
with the same output is refused at once; inside, layers lie under a hash of all that decides them, so that layers of
other options, text or weights are never taken for one's own.

    with refit_folder(output) as work:
        folder = layers_folder(work, key)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from stocha_hf.checkpoints.staging import try_lock
from stocha_hf.errors import StochaError

LAYER_FILES = "layer-*.safetensors"


@dataclass(frozen=True)
class Refit:
    """What to refit on and towards; recorded in config.json under `stocha.history`.

    `data` is a file, folder or Hub data set (stocha_hf/data/rows.py), `tokens` how many of its tokens to use,
    `target_sparsity` the wanted share of zeros in the hidden vectors (None: plain ReLU's), `on_disk` whether the
    streams are kept in the work folder instead of in memory. Raises StochaError.
    """

    data: str
    tokens: int | None = None
    target_sparsity: float | None = None
    on_disk: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        target, tokens = self.target_sparsity, self.tokens
        if not isinstance(self.data, str | Path) or not str(self.data).strip():
            raise StochaError(f"the data to refit on is {self.data!r}: expected a file, a folder or a Hub data set")
        if tokens is not None and (type(tokens) is not int or tokens < 1):
            raise StochaError(f"the number of tokens to refit on is {tokens!r}: expected a whole number of at least 1")
        if target is not None and not (type(target) in (int, float) and 0 < target < 1):
            raise StochaError(f"the sparsity target is {target!r}: expected a share of zeros between 0 and 1")


@contextmanager
def refit_folder(output: Path, kind: str = "refit") -> Iterator[Path]:
    """Yield the locked work folder of a run to `output`. It stays where a run that fails leaves finished layers.

    Raises StochaError where another run of this kind to the same output is running.
    """
    output = Path(os.path.abspath(output))
    folder = output.with_name(f".{output.name}.{kind}")
    new_parents = [parent for parent in output.parents if not parent.exists()]
    lock = _locked(folder, output, kind)
    succeeded = False
    try:
        yield folder
        succeeded = True
    finally:
        if succeeded or not any(folder.glob(f"*/{LAYER_FILES}")):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        for parent in new_parents:
            with suppress(OSError):  # not empty
                parent.rmdir()


def _locked(folder: Path, output: Path, kind: str) -> int:
    try:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            lock = try_lock(folder)
            if lock is None:
                raise StochaError(
                    f"another {kind} is writing {output}: wait until it is done or choose another output"
                )
            if folder.exists() and os.path.samestat(os.fstat(lock), folder.stat()):
                return lock
            os.close(lock)  # of a folder that another run has just removed
    except OSError as error:
        raise StochaError(
            f"cannot write {folder} ({error.strerror or error}): free space or choose another output"
        ) from error


def layers_folder(work: Path, key: str) -> Path:
    """The folder of the layers that `key` decides; those of another key are removed."""
    folder = work / key
    for path in work.iterdir():
        if path.is_dir() and path != folder:
            shutil.rmtree(path)
        elif path != folder:
            path.unlink()
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def reading_layer(path: Path) -> Iterator[None]:
    """Within it, a finished layer's file that cannot be read ends the run with its name and what to do."""
    try:
        yield
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StochaError(
            f"{path} cannot be read ({error}): expected a finished layer; remove it and start again with the same "
            "command, which makes this layer again"
        ) from error
