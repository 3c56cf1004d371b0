"""Run code that a model wrote: each program in a process of its own, with limits of time and memory, without network.

This guards against accidents, not against attacks: a program can read and write the user's files. So nothing is run
unless the user asks for it. The network is taken away with a network namespace of the process' own, where the kernel
allows one; elsewhere Python's sockets are replaced, which only stops code that does not look for a way around.
`network_guard()` says which of the two it is here.

    run_programs(["assert 1 + 1 == 2", "while True: pass"])    # [None, "took longer than 10 s"]
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

from stocha_hf.progress import Progress

SECONDS = 10  # of a program; on two busy cores all 164 solutions that HumanEval brings end within it
MEMORY = 4 * 2**30  # bytes of address space: numpy alone asks for one GiB
NAMESPACE, SOCKETS = "a network namespace of its own", "Python's sockets replaced"
GUARD = """
import ctypes, resource, sys
memory, seconds = int(sys.argv[1]), int(sys.argv[2])
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
if ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET):
    import socket
    def refuse(*args, **kwargs):
        raise OSError("no network here")
    socket.socket = socket.create_connection = socket.getaddrinfo = refuse
    guard = "SOCKETS"
else:
    guard = "NAMESPACE"
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_FSIZE, (2**24, 2**24))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
"""
PROGRAM = """
sys.argv = ["program.py"]
with open("program.py", encoding="utf-8") as file:
    program = file.read()
exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
"""
PLAIN = {"PATH": os.defpath, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def run_programs(programs: Sequence[str]) -> list[str | None]:
    """Run each program, as many at a time as there are cores.

    Args:
        programs: Python source.

    Returns:
        Of each what went wrong in a few words, or None where it ran to its end.
    """
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        runs = pool.map(_run, programs)
        return list(Progress(runs, "Running code", len(programs), unit="program"))


@cache
def network_guard() -> str:
    """Return how programs are kept from the network here: NAMESPACE or SOCKETS."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "out").open("w+b") as out:
        _start(GUARD + "print(guard)", folder, out).wait()
        out.seek(0)
        return NAMESPACE if b"NAMESPACE" in out.read() else SOCKETS


def _start(source: str, folder: str, out: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-c", source, str(MEMORY), str(SECONDS)],
        cwd=folder,
        env=PLAIN,
        stdin=subprocess.DEVNULL,
        stdout=out,  # a file: a pipe that nobody empties would stop the program
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _run(program: str) -> str | None:
    with tempfile.TemporaryDirectory(prefix="stocha-code-", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "program.py").write_text(program, encoding="utf-8", errors="replace")
        with (Path(folder) / "out").open("w+b") as out:
            child = _start(GUARD + PROGRAM, folder, out)
            try:
                status = child.wait(SECONDS)
            except subprocess.TimeoutExpired:
                status = -signal.SIGXCPU
            finally:
                _end(child)
            if status == 0:
                return None
            if status in (-signal.SIGXCPU, -signal.SIGKILL):
                return f"took longer than {SECONDS} s"
            out.seek(max(out.seek(0, os.SEEK_END) - 1000, 0))
            lines = out.read().decode(errors="replace").strip().splitlines()
            return (lines[-1] if lines else f"ended with status {status}")[:200]


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the program and whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
