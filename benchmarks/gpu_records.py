"""What the GPU's benchmarks share: a sentence where there is no GPU, and a line of JSON a measurement, to the screen
and to a file of results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from stocha_hf.cli import fail
from stocha_hf.decoding import triton_ffn


def check_gpu(parser: argparse.ArgumentParser, device: str = "cuda", triton: bool = False) -> None:
    """End the program with a sentence where `device` is a GPU and there is none; or no Triton, if that is needed."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        fail(parser.prog, "there is no GPU here: expected a machine that has one")
    if triton and not triton_ffn.available():
        fail(parser.prog, "Triton is not installed: expected it beside PyTorch, for the GPU's kernels")


def report(record: dict[str, Any], path: Path | None) -> None:
    """Print a measurement with the card's name, in four digits, and add it to a file, if there is one."""
    line = json.dumps({"device": torch.cuda.get_device_name(), **_rounded(record)})
    print(line, flush=True)
    if path:
        with path.open("a") as file:
            file.write(line + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
