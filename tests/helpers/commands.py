"""The package's commands, in a fresh process or in this one, and what a refusal looks like.

A fresh process costs seconds, most of them imports. Use `call_command` unless the test needs its own environment, an
interpreter that has not imported something, or the installed script itself; and `run_warm` where that something is
neither torch nor transformers, or a `Warm` of the file's own where other imports or settings cost the seconds.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

BIN = Path(sys.executable).parent
Done = subprocess.CompletedProcess[str]


def run_python(code: str, *args: object, env: dict[str, str] | None = None) -> Done:
    """Run code in a fresh interpreter with sys.argv[1:] = args."""
    return _run([sys.executable, "-c", code, *map(str, args)], env)


def run_warm(code: str, *args: object, given: str = "") -> Done:
    """Run code as `run_python` does, in a process that has imported torch and transformers and has one thread."""
    return _warm().run(code, *args, given=given)


@functools.cache
def _warm() -> Warm:
    return Warm()


class Warm:
    """Processes forked from one that has imported torch, transformers and these modules, in this environment.

    That one ends with `close`, or with this process, when its input ends.
    """

    def __init__(self, *modules: str, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, str(Path(__file__).with_name("warm.py")), *modules]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server: subprocess.Popen[str] = subprocess.Popen(command, env=os.environ | (env or {}), **pipes)

    def run(self, code: str, *args: object, given: str = "", env: dict[str, str] | None = None) -> Done:
        """Run code as `run_python` does; env reaches what reads it later than at its import."""
        argv = [*map(str, args)]
        assert self.server.stdin and self.server.stdout
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("in", "out", "errors")]
            for path, text in zip(files, (given, "", ""), strict=True):
                path.write_text(text)
            request = {"code": code, "argv": argv, "files": [*map(str, files)], "env": env or {}}
            self.server.stdin.write(json.dumps(request) + "\n")
            self.server.stdin.flush()
            status = int(self.server.stdout.readline())
            return Done(argv, status, files[1].read_text(), files[2].read_text())

    def close(self) -> None:
        self.server.communicate()


TWO_RANKS = """
def joined(rank, port):
    import torch, torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    one(rank)
    dist.destroy_process_group()

if __name__ == "__main__":
    import socket
    from torch.multiprocessing import start_processes
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(joined, (port,), 2, start_method="fork")
"""


def run_two_ranks(code: str, *args: object) -> Done:
    """Run code as run_warm does, and then its function one(rank) in two processes of a gloo group."""
    return run_warm(code + TWO_RANKS, *args)


def run_command(name: str, *args: object, env: dict[str, str] | None = None) -> Done:
    """Run one of the package's commands, as installed, in a fresh process."""
    return _run([str(BIN / name), *map(str, args)], env)


def _run(command: list[str], env: dict[str, str] | None) -> Done:
    return subprocess.run(command, env=os.environ | (env or {}), capture_output=True, text=True, timeout=300)


def call_command(name: str, *args: object) -> Done:
    """Run one of the package's commands in this process; an exception other than SystemExit is raised here."""
    main = importlib.import_module(f"stocha_hf.cli.{name.removeprefix('stocha-')}").main
    argv, out, err = [name, *map(str, args)], io.StringIO(), io.StringIO()
    status = 0
    with mock.patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
    return subprocess.CompletedProcess(argv, status, out.getvalue(), err.getvalue())


def assert_refused(done: Done, *words: str) -> None:
    """Exit status 2 and one sentence on stderr that holds all the words."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
