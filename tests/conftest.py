"""The tests' environment and fixtures; the functions that they share are in helpers/.

No network: models are made from their configs, and the Hub is helpers/loopback_hub.py. The Hub's client reads its
settings when it is imported, so whatever talks to a Hub runs in a subprocess. Compiled kernels stay in the user's
cache, named by a hash of their source: compiling takes 10 seconds, and each process of the tests would do it.

torch is imported by the fixtures: pytest-xdist reads this file in a process that runs no test, and starts the others
after that.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

_HOME = tempfile.TemporaryDirectory(prefix="stocha-tests-")  # nothing of the user's is used, nothing is left
os.environ |= {"HF_HOME": _HOME.name, "HF_HUB_OFFLINE": "1"}  # read when the libraries below are imported
if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core: more threads would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

LONGEST = ("test_distributed.py", "test_training.py")  # a minute each

if TYPE_CHECKING:
    import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files begin: at the end, one process would wait for the other."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """checkpoint("llama", name="source", dtype=torch.bfloat16, max_shard_size="20KB", ...): a source folder."""

    def make(
        model_type: str = "llama",
        *,
        name: str = "source",
        dtype: torch.dtype | None = None,
        max_shard_size: str = "1GB",
        **overrides: Any,
    ) -> Path:
        from helpers import tiny_model, tiny_tokenizer

        folder = tmp_path / name
        tiny_model(model_type, **overrides).to(dtype=dtype).save_pretrained(folder, max_shard_size=max_shard_size)
        tiny_tokenizer().save_pretrained(folder)
        (folder / "LICENSE").write_text("Apache License, Version 2.0\n")
        (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# The source\n")
        return folder

    return make


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small run slower on more."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile with nothing compiled: it counts recompilations of a function over all tests of a process."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def base(checkpoint, tmp_path) -> Path:
    from stocha_hf.conversion.convert import convert

    convert(checkpoint(), tmp_path / "base", p=0.3)
    return tmp_path / "base"


@pytest.fixture
def text(tmp_path) -> Path:
    """Periodic sequences of words, which a tiny model learns within a few steps."""
    rows = [" ".join(f"w{4 + (7 * i + 3 * j) % 60}" for j in range(40)) for i in range(200)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path
