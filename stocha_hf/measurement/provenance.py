"""Where figures come from: which model, command, versions and hardware, so that they can be measured again.

origin("smollm2-sparse", model) | circumstances()
"""

from __future__ import annotations

import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.hashing import weights_hash
from stocha_hf.spec import __version__


def origin(name: str, model: Any) -> dict[str, Any]:
    """What was measured: `model`; `weights`, the hash of a local folder; or `revision`, the commit of a Hub id."""
    folder = Path(name)
    return {
        "model": name,
        "weights": weights_hash(folder) if folder.is_dir() else None,
        "revision": getattr(model.config, "_commit_hash", None),
    }


def circumstances() -> dict[str, Any]:
    """`command` as typed, `versions` of the libraries, `hardware` with the threads that PyTorch uses on a CPU."""
    import torch
    import transformers

    versions = {"stocha_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    threads = torch.get_num_threads()
    processor = f"{_processor()}, {threads} thread{'s' if threads != 1 else ''}"
    return {
        "command": shlex.join([_program(), *sys.argv[1:]]),
        "versions": versions,
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else processor,
    }


def _program() -> str:
    """The command's name, also where it was started as a module of cli/."""
    path = Path(sys.argv[0])
    return f"stocha-{path.stem}" if path.parent == Path(__file__).parent.parent / "cli" else path.name


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
