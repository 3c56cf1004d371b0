"""The kernels' cache: what is loaded from it, and what becomes of a library or folder that cannot be trusted.

Most tests compile a source of empty functions, which takes a moment where kernels.cpp takes ten seconds.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stocha_hf.decoding import build

FLAGS = ("-fPIC",)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache's folder; the kernels' source is a stub whose stocha_read(...) returns 7."""
    source = tmp_path / "stub.cpp"
    functions = "\n".join(f"long {name}() {{ return 7; }}" for name in build.FUNCTIONS)
    source.write_text(f'extern "C" {{\n{functions}\n}}\n')
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    yield tmp_path / "cache" / "stocha_hf"


def loaded() -> int:
    return int(build.load(FLAGS).stocha_read(None, 0, 0))


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def test_the_cache_is_closed_to_others_under_any_umask(cache: Path) -> None:
    before = os.umask(0)
    try:
        assert loaded() == 7
    finally:
        os.umask(before)
    (library,) = libraries(cache)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (cache, library)] == [0o700, 0o700]
    written = library.stat().st_mtime_ns
    assert loaded() == 7 and library.stat().st_mtime_ns == written  # taken from the cache


@pytest.mark.parametrize("spoil", ["truncated", "foreign", "empty", "text"])
def test_a_library_that_is_not_whole_is_compiled_again(
    cache: Path, spoil: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Loading a truncated library is a SIGBUS, and a foreign one has other functions."""
    build.load(FLAGS)
    (library,) = libraries(cache)
    content = library.read_bytes()
    library.unlink()  # this process has it loaded: it must not change under its feet
    if spoil == "foreign":
        other = cache.parent / "other.cpp"
        other.write_text('extern "C" long other() { return 1; }\n')
        subprocess.run(["g++", "-shared", "-fPIC", str(other), "-o", str(library)], check=True)
    else:
        library.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"mine"}[spoil])
    caplog.clear()
    assert loaded() == 7
    assert libraries(cache) == [library] and library.read_bytes()[-32:] == content[-32:]
    assert f"{library} is truncated, or not what stocha_hf built: it is compiled again" in caplog.text


@pytest.mark.parametrize("loose", [0o777, 0o775])
@pytest.mark.parametrize("what", ["folder", "library"])
def test_what_others_can_write_is_not_loaded(
    cache: Path, what: str, loose: int, caplog: pytest.LogCaptureFixture
) -> None:
    build.load(FLAGS)
    (library,) = libraries(cache)
    library.unlink()
    shutil.copy(build.SOURCE, library)  # loading it would fail
    (cache if what == "folder" else library).chmod(loose)
    caplog.clear()
    assert loaded() == 7
    assert "can be written by other users" in caplog.text and "for this process alone" in caplog.text
    assert library.read_bytes() == build.SOURCE.read_bytes()


@pytest.mark.parametrize("what", ["folder", "library"])
def test_what_belongs_to_others_is_not_loaded(
    cache: Path, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build.load(FLAGS)
    (library,) = libraries(cache)
    if os.geteuid() == 0:
        os.chown(cache if what == "folder" else library, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert loaded() == 7
    assert "belongs to another user" in caplog.text


def test_a_link_in_place_of_the_folder_is_not_followed(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = cache.parent / "elsewhere"
    target.mkdir(parents=True)
    cache.symlink_to(target)
    assert loaded() == 7 and not list(target.iterdir())
    assert "is a link" in caplog.text


@pytest.mark.parametrize("home", ["a file", "read-only", "nowhere"])
def test_without_a_cache_the_kernels_are_compiled_for_the_process(
    cache: Path, home: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if home == "a file":
        cache.parent.mkdir()
        cache.write_text("a file where the folder should be")
    elif home == "read-only":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/stocha")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    assert loaded() == 7
    assert "for this process alone" in caplog.text


def test_builds_at_once_leave_one_library(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow g++"
    slow.write_text('#!/bin/sh\ncase "$*" in *--version*) ;; *) sleep 0.2 ;; esac\nexec g++ "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{slow}' -O1")  # a command with an option, as CXX may be
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: loaded(), range(4))) == [7] * 4
    assert [path.suffix for path in libraries(cache)] == [".so"]
    monkeypatch.setenv("CXX", f"'{slow}' -O2")
    assert loaded() == 7 and len(libraries(cache)) == 2  # another option, another library


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("/nonexistent/g++ -O2", "CXX names /nonexistent/g++, which is not there"),
        ("false", "'--version']' returned non-zero"),
    ],
)
def test_without_a_working_compiler_one_warning_names_the_cause(
    cache: Path, compiler: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    build._kernels.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert build.kernels() is None and build.kernels() is None
    finally:
        build._kernels.cache_clear()
    (warning,) = caught
    assert "sparse kernels cannot be built, so decoding falls back to PyTorch" in str(warning.message)
    assert words in str(warning.message)


def test_libraries_of_one_process_share_nothing() -> None:
    library = build.kernels()
    assert library is not None
    defined = subprocess.run(
        ["nm", "-D", "--defined-only", library._name], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    named = {line.split()[-1]: line.split()[-2] for line in defined}
    assert set(build.FUNCTIONS) <= set(named)
    assert "u" not in named.values(), "buffers of this name in another build's library would be the same"
