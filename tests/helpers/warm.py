"""Processes that have imported torch and transformers and done nothing else: forks of this script.

Importing both takes seconds, and tests of published folders need many processes. Nothing of stocha_hf is imported
here, unless an argument names a module to import as well, so a fork may load such a folder without the package, or
import it for the first time. Use Warm or run_warm of commands.py, which write one request a line, {"code", "argv",
"files", "env"}, and read back each exit status.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any

SECONDS = 300  # a process that takes longer is killed


def main() -> None:
    """Answer requests until the input ends."""
    sys.path[0] = ""  # as with -c; this folder's modules are not for importing
    import accelerate  # noqa: F401 - for device_map
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: F401 - imported when first named
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.models.mistral import modeling_mistral  # noqa: F401

    for name in sys.argv[1:]:
        importlib.import_module(name)
    torch.set_num_threads(1)  # threads would not survive a fork
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run(code: str, argv: list[str], files: list[str], env: dict[str, str]) -> None:
    """Run code as a fresh interpreter would, with these files for input, output and errors, and end the process."""
    signal.alarm(SECONDS)
    os.environ.update(env)
    for number, name in enumerate(files):
        os.dup2(os.open(name, os.O_RDWR), number)
    sys.argv = ["-c", *argv]
    status: Any = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        status = stop.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    main()
