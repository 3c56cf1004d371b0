"""Local data files: which ones a name means, and what is wrong with one that cannot be read.

datasets reads the files. Where it fails, its message names neither file nor row, and a JSON document of very deep
nesting ends the process. So the files are found and looked over here, and a failure is explained by reading them again
in plain Python, which only happens then.

    local_files("books")                       # ("text", [PosixPath("books/a.txt"), ...])
    explain(files, error)                      # "row 3 of chat.jsonl is not a JSON object (Expecting value)"
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path

from stocha_hf.checkpoints.paths import is_path, local_path
from stocha_hf.errors import StochaError

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
NESTED = 500  # brackets in a line, from which on it is worth reading it to see how deep they go
CACHE_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def local_files(name: str) -> tuple[str, list[Path]] | None:
    """Find the files that a data set's name means, and datasets' builder for them; None for a Hub data set.

    Raises:
        StochaError: the file is absent or of no known kind, or a folder holds no such files or several kinds of them.
    """
    path = local_path(name)
    kinds = ", ".join(BUILDERS)
    if not path.exists():
        if path.suffix in BUILDERS or is_path(name):
            raise StochaError(
                f"the data file {name} does not exist: expected a local file or the id of a Hub data set"
            )
        return None
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in found if file.suffix in BUILDERS and file.is_file()]
    if not files:
        raise StochaError(f"{name} holds no text: expected {kinds} files")
    builders = sorted({BUILDERS[file.suffix] for file in files})
    if len(builders) > 1:
        raise StochaError(f"{name} holds {' and '.join(builders)} files: expected one kind; name a file of it")
    for file in files:
        _check_file(file)
    return builders[0], files


def _check_file(file: Path) -> None:
    if not os.access(file, os.R_OK):
        raise StochaError(f"{file} cannot be read: expected a file that you have permission to read")
    if BUILDERS[file.suffix] == "json":
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.count(b"[") + line.count(b"{") > NESTED and _is_too_deep(line):
                    raise StochaError(f"row {number} of {file} is nested too deep: expected a JSON object of text")


def _is_too_deep(line: bytes) -> bool:
    try:
        json.loads(line)
    except RecursionError:
        return True
    except ValueError:
        pass  # a part of a document, or no JSON: reading it says so
    return False


def explain(files: list[Path], error: Exception) -> str:
    """Say what is wrong with files that datasets failed to read with `error`: a sentence without its end."""
    causes = _chain(error)
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in CACHE_TROUBLE:
            return f"the cache of datasets cannot be written ({cause.strerror}): free space, or set HF_DATASETS_CACHE"
    for file in files:
        if trouble := _trouble(file):
            return trouble
    reason = first_line(causes[-1])
    return (
        f"{files[0] if len(files) == 1 else files[0].parent} cannot be read ({reason}): expected whole files of text"
    )


def _trouble(file: Path) -> str | None:
    """What is wrong with one file, as far as plain Python can say."""
    try:
        if file.stat().st_size == 0:
            return f"{file} is empty: expected at least one row of text"
        if file.suffix == ".parquet":
            with file.open("rb") as content:
                if content.read(4) != b"PAR1" or content.seek(-4, os.SEEK_END) < 8 or content.read(4) != b"PAR1":
                    return f"{file} is truncated or no parquet file: expected a whole one"
            return None
        with file.open(encoding="utf-8") as lines:
            if file.suffix == ".jsonl":
                return _bad_json_line(file, lines)
            for _ in lines:  # decoding fails where it does
                pass
            return None
    except UnicodeDecodeError as error:
        return f"{file} is not in UTF-8 ({error.reason}): expected UTF-8; convert it with iconv"
    except OSError as error:
        return f"{file} cannot be read ({error.strerror}): expected a file that can be read"


def _bad_json_line(file: Path, lines: Iterable[str]) -> str | None:
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError) as error:
            return f"row {number} of {file} is not a JSON object ({getattr(error, 'msg', error)}): expected one a line"
        if not isinstance(content, dict):
            return f"row {number} of {file} is a JSON {type(content).__name__}: expected an object with a text column"
    return None


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from: datasets' own message says only that something failed."""
    found = [error]
    while (cause := found[-1].__cause__) is not None and cause not in found:
        found.append(cause)
    return found


def first_line(error: BaseException) -> str:
    """An exception's text as a reason in brackets."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
