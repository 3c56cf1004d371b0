"""The tests' environment and fixtures; the functions that they share are in helpers/.

No network: models are made from their configs, and the Hub is helpers/loopback_hub.py. The Hub's client reads its
settings when it is imported, so whatever talks to a Hub runs in a subprocess. Compiled kernels stay in the user's
cache, named by a hash of their source: compiling takes 10 seconds, and each process of the tests would do it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_HOME = tempfile.TemporaryDirectory(prefix="stocha-tests-")  # nothing of the user's is used, nothing is left
os.environ |= {"HF_HOME": _HOME.name, "HF_HUB_OFFLINE": "1"}  # read when the libraries below are imported
if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core: more threads would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from helpers import tiny_model, tiny_tokenizer

from stocha_hf.conversion.convert import convert


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """checkpoint("llama", name="source", dtype=torch.bfloat16, max_shard_size="20KB", ...): a source folder."""

    def make(
        model_type: str = "llama",
        *,
        name: str = "source",
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "1GB",
        **overrides: Any,
    ) -> Path:
        folder = tmp_path / name
        tiny_model(model_type, **overrides).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
        tiny_tokenizer().save_pretrained(folder)
        (folder / "LICENSE").write_text("Apache License, Version 2.0\n")
        (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# The source\n")
        return folder

    return make


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small run slower on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile with nothing compiled: it counts recompilations of a function over all tests of a process."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def base(checkpoint, tmp_path) -> Path:
    convert(checkpoint(), tmp_path / "base", p=0.3)
    return tmp_path / "base"


@pytest.fixture
def text(tmp_path) -> Path:
    """Periodic sequences of words, which a tiny model learns within a few steps."""
    rows = [" ".join(f"w{4 + (7 * i + 3 * j) % 60}" for j in range(40)) for i in range(200)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path
