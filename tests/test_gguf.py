"""Conversion of a .gguf file: the tensors are those that the gguf package itself dequantizes."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from helpers import assert_refused, run_command
from safetensors.torch import load_file
from transformers import AutoTokenizer

HIDDEN, WIDTH, HEADS, VOCAB = 64, 96, 2, 32


def write_gguf(path) -> dict[str, np.ndarray]:
    """A one-layer llama with Q8_0 matrices and a word tokenizer; returns its float tensors by GGUF name."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(97 + i) for i in range(26)] + ["ab", "cd"] + [f"<{i}>" for i in range(4)])
    writer.add_token_types([1] * 28 + [3] * 4)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(28)
    writer.add_eos_token_id(29)
    shapes = {
        "token_embd.weight": (VOCAB, HIDDEN),
        "output.weight": (VOCAB, HIDDEN),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_v.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate.weight": (WIDTH, HIDDEN),
        "blk.0.ffn_up.weight": (WIDTH, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, WIDTH),
    }
    made = {}
    for name, shape in shapes.items():
        packed = gguf.quantize(rng.normal(size=shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        made[name] = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        made[name] = rng.normal(size=HIDDEN).astype(np.float32)
        writer.add_tensor(name, made[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


@pytest.mark.slow
def test_a_gguf_file_becomes_an_ordinary_checkpoint(tmp_path):
    source, out = tmp_path / "model.gguf", tmp_path / "out"
    made = write_gguf(source)
    done = run_command("stocha-convert", source, out, "--dtype", "float32", "--base-model", "org/model", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source"] == {"id": "org/model", "revision": None}
    weights = load_file(out / "model.safetensors")
    for part in ("gate", "up", "down"):
        stored = weights[f"model.layers.0.mlp.{part}_proj.weight"]
        assert stored.dtype == torch.float32
        assert torch.equal(stored, torch.from_numpy(made[f"blk.0.ffn_{part}.weight"]))
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["stocha"]["base"] == "silu"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (28, 29)
    assert "license: apache-2.0" in (out / "README.md").read_text()


def test_a_truncated_gguf_file_is_refused(tmp_path):
    source = tmp_path / "model.gguf"
    write_gguf(source)
    source.write_bytes(source.read_bytes()[:-5000])
    assert_refused(run_command("stocha-convert", source, tmp_path / "out"), "model.gguf cannot be read as GGUF")
    assert not (tmp_path / "out").exists()
