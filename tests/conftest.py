"""What the tests share: tiny checkpoints of every architecture, a throw-away tokenizer, and the commands in fresh
processes.

No network: models are made from their configs, and the Hub is tests/loopback_hub.py. Settings of the Hub's client are
read when it is imported, so whatever talks to a Hub runs in a subprocess.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_HOME = tempfile.TemporaryDirectory(prefix="stocha-tests-")  # nothing of the user's is used, nothing is left
os.environ |= {
    "HF_HOME": _HOME.name,
    "XDG_CACHE_HOME": _HOME.name,
    "HF_HUB_OFFLINE": "1",
}  # read when the libraries below are imported

import torch
import transformers
from loopback_hub import LoopbackHub

from stocha_hf.modeling_stocha import ARCHITECTURES

BIN = Path(sys.executable).parent
CONFIGS = {  # model_type -> config class and what it needs beyond the sizes below
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3TextConfig", {"head_dim": 8, "query_pre_attn_scalar": 8}),
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_model(model_type: str = "llama", **overrides: Any) -> Any:
    """A native CausalLM of two layers in eval mode; fixed random weights, large enough for activations to matter."""
    class_name, extra = CONFIGS[model_type]
    config = getattr(transformers, class_name)(**{**SIZES, "initializer_range": 0.3, **extra, **overrides})
    torch.manual_seed(0)
    return getattr(transformers, ARCHITECTURES[model_type].causal_lm)(config).eval()


def tiny_tokenizer() -> Any:
    """One token per word w4..w63, with the specials that the tiny configs name and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, 64)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )
    tokenizer.chat_template = "{% for message in messages %}w4 {{ message['content'] }} {% endfor %}w5"
    return tokenizer


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
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        yield server


def run_python(code: str, *args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter with sys.argv[1:] = args."""
    return _run([sys.executable, "-c", code, *map(str, args)], env)


def run_command(name: str, *args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of the package's commands, as installed."""
    return _run([str(BIN / name), *map(str, args)], env)


def _run(command: list[str], env: dict[str, str] | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=os.environ | (env or {}), capture_output=True, text=True, timeout=300)


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit status 2 and one sentence on stderr that holds all the words."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
