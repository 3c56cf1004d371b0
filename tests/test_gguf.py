"""Conversion of .gguf files: weights and config are the native model's that was written, whatever llama.cpp does to
names, rotary pairs and norms; what cannot be carried over is refused before anything is written.
"""

from __future__ import annotations

import json
import math
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers import assert_refused, call_command, run_warm, tiny_model, tiny_tokenizer
from helpers.gguf_writer import ARCHS, pieces, write_gguf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from stocha_hf.conversion.convert import convert
from stocha_hf.conversion.gguf import check_gguf
from stocha_hf.conversion.gguf_header import read_gguf_header
from stocha_hf.errors import StochaError

TOKENS = torch.tensor([[1, 5, 9, 17, 28, 4, 8, 30]])
VOCAB = 32


def small_llama(**options: Any) -> Any:
    return tiny_model("llama", vocab_size=VOCAB, **options)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
        ("qwen2", {}),
        ("qwen3", {"attention_bias": False}),
        ("gemma2", {"sliding_window": 4}),
        ("gemma3_text", {"sliding_window": 4}),
    ],
)
def test_a_gguf_file_computes_what_its_model_computes(tmp_path, model_type, options):
    model = tiny_model(model_type, vocab_size=VOCAB, rms_norm_eps=1e-5, **options)
    for parameter in model.parameters():  # biases and norms too
        parameter.data += 0.1 * torch.randn_like(parameter)
    write_gguf(tmp_path / "m.gguf", model)
    convert(tmp_path / "m.gguf", tmp_path / "out", dtype="float32")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(found) is type(model) and config_of(tmp_path / "out")["rms_norm_eps"] == 1e-5
    expected = model.state_dict()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6 if "norm" in name else 0)
    with torch.no_grad():
        torch.testing.assert_close(found(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_quantized_file_becomes_an_ordinary_checkpoint_by_the_command(tmp_path):
    source, out = tmp_path / "model.GGUF", tmp_path / "out"
    made = write_gguf(source, small_llama(intermediate_size=96), quantized=gguf.GGMLQuantizationType.Q8_0)
    tiny_tokenizer().save_pretrained(tmp_path)  # a neighbour's, which is not the file's
    done = call_command("stocha-convert", source, out, "--dtype", "float32", "--base-model", "org/model", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source"] == {"id": "org/model", "revision": None}
    weights = load_file(out / "model.safetensors")
    for part in ("gate", "up", "down"):
        stored = weights[f"model.layers.0.mlp.{part}_proj.weight"]
        assert stored.dtype == torch.float32
        assert torch.equal(stored, torch.from_numpy(made[f"blk.0.ffn_{part}.weight"]))
    config = config_of(out)
    assert "quantization_config" not in config and config["stocha"]["base"] == "silu"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (28, 29)
    assert tokenizer.convert_ids_to_tokens([4, 26]) == ["e", "ab"]
    assert "license: apache-2.0" in (out / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_all_parts_of_a_split_file_are_read_given_any(tmp_path):
    model = small_llama()
    write_gguf(tmp_path / "m.gguf", model, split_max_tensors=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3
    for part in parts:
        assert check_gguf(part).path == parts[0]
    convert(parts[2], tmp_path / "out", dtype="float32")
    weights, expected = load_file(tmp_path / "out" / "model.safetensors"), model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    parts[1].rename(tmp_path / "elsewhere")
    with pytest.raises(StochaError, match=r"00002-of-00003.gguf is missing: expected all 3 parts"):
        convert(parts[0], tmp_path / "other")
    (tmp_path / parts[1].name).write_bytes(parts[0].read_bytes())
    with pytest.raises(StochaError, match="is not part 2 of 3"):
        convert(parts[0], tmp_path / "other")
    parts[0].rename(tmp_path / "m.gguf")
    with pytest.raises(StochaError, match=r"one of 3 parts: expected a name such as"):
        convert(tmp_path / "m.gguf", tmp_path / "other")
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".*"))


def llama3_factors(head_dim: int, base: float, factor: float, context: int = 8192) -> np.ndarray:
    """As llama.cpp's converter computes them."""
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * base ** (index / head_dim)
        if wavelength < context / 4:
            factors.append(1.0)
        elif wavelength > context:
            factors.append(factor)
        else:
            smooth = (context / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def scaled(kind: Any, factor: float = 4.0, context: int | None = 32) -> Callable[[gguf.GGUFWriter], None]:
    def add(writer: gguf.GGUFWriter) -> None:
        if kind is not None:
            writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(factor)
        if context:
            writer.add_rope_scaling_orig_ctx_len(context)

    return add


def test_scaled_rotary_embeddings_are_carried_over(tmp_path):
    model = tiny_model(
        "llama", vocab_size=VOCAB, head_dim=64, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}
    )
    factors = llama3_factors(64, 5e5, 32.0)
    assert len({*factors.tolist()} - {1.0, 32.0}) > 1
    write_gguf(tmp_path / "llama3.gguf", model, change=lambda t: t.update({"rope_freqs.weight": factors}))
    for kind in (gguf.RopeScalingType.YARN, gguf.RopeScalingType.LINEAR):
        write_gguf(tmp_path / f"{kind.value}.gguf", model, more=scaled(kind))
    write_gguf(tmp_path / "unnamed.gguf", model, more=scaled(None, context=None))
    write_gguf(tmp_path / "old.gguf", model, more=lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0))
    write_gguf(tmp_path / "unscaled.gguf", model, more=scaled(None, 1.0))
    found = {path.stem: check_gguf(path).config["rope_parameters"] for path in tmp_path.glob("*.gguf")}
    base = {"rope_theta": 500000.0}
    assert found == {
        "llama3": base
        | {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8192},
        "yarn": base | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        "linear": base | {"rope_type": "linear", "factor": 4.0},
        "unnamed": base | {"rope_type": "linear", "factor": 4.0},  # as llama.cpp reads a factor without a type
        "old": base | {"rope_type": "linear", "factor": 4.0},
        "unscaled": base | {"rope_type": "default"},
    }
    write_gguf(tmp_path / "ones.gguf", model, change=lambda t: t.update({"rope_freqs.weight": np.ones_like(factors)}))
    assert check_gguf(tmp_path / "ones.gguf").config["rope_parameters"] == base | {"rope_type": "default"}
    gemma = tiny_model("gemma3_text", vocab_size=VOCAB, sliding_window=4)
    write_gguf(tmp_path / "gemma.gguf", gemma, more=scaled(gguf.RopeScalingType.LINEAR, 8.0, None))
    parameters = check_gguf(tmp_path / "gemma.gguf").config["rope_parameters"]
    assert parameters["full_attention"] == {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0}
    assert parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text"])
def test_a_vocabulary_of_sentencepiece_reads_words_and_begins_with_bos(tmp_path, model_type):
    write_gguf(tmp_path / "m.gguf", tiny_model(model_type, vocab_size=VOCAB, sliding_window=4), vocabulary=pieces)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a the and")["input_ids"])
    assert (tokens[0], tokens[-2:]) == ("<s>", ["\u2581the", "\u2581and"])


def test_a_vocabulary_of_llama_3_begins_with_bos_where_the_file_does_not_say(tmp_path):
    write_gguf(tmp_path / "m.gguf", small_llama(), more=lambda writer: writer.add_tokenizer_pre("llama-bpe"))
    convert(tmp_path / "m.gguf", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab")["input_ids"] == [28, 26]


def without_merges(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*map(chr, range(97, 123)), "ab", "\u0120the", "\u0120and", "<s>", "<2>", "<3>"])
    writer.add_token_scores([0.0] * 32)
    writer.add_token_types([1] * 29 + [3] * 3)
    writer.add_token_merges(["a b"])


def test_a_tokenizer_that_does_not_read_as_the_file_means_it_is_refused(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf", small_llama(), vocabulary=without_merges)
    with pytest.raises(StochaError, match=r"reads it, cuts 2 of 2 words .* such as 'the': update transformers, or"):
        convert(tmp_path / "m.gguf", tmp_path / "out")
    write_gguf(tmp_path / "m.gguf", small_llama(), vocabulary=pieces)
    monkeypatch.setattr(PreTrainedTokenizerFast, "update_post_processor", lambda self: None)
    with pytest.raises(StochaError, match=r"reads it, begins no text with '<s>': update transformers, or"):
        convert(tmp_path / "m.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def drop(name: str) -> dict[str, Any]:
    return {"change": lambda tensors: tensors.pop(name)}


def put(name: str, *shape: int) -> dict[str, Any]:
    return {"change": lambda tensors: tensors.update({name: np.full(shape, 2, dtype=np.float32)})}


def spoil(tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.0.ffn_up.weight"][0, 0] = np.nan


LONGROPE = scaled(gguf.RopeScalingType.LONGROPE)
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {  # case -> (options of write_gguf, what the sentence says)
    "no up_proj": (drop("blk.1.ffn_up.weight"), r"tensor layers.1.mlp.up_proj.weight of .* is missing"),
    "no embedding": (drop("token_embd.weight"), r"None for the rows of token_embd.weight"),
    "no final norm": (drop("output_norm.weight"), r"tensor norm.weight of .* is missing"),
    "another shape": (put("blk.0.attn_k.weight", 8, 32), r"k_proj.weight of .* shape \[8, 32\]: expected \[16, 32\]"),
    "a layer too many": (put("blk.2.attn_q.weight", 32, 32), r"tensor layers.2.self_attn.q_proj.weight, .* ignore"),
    "an unknown tensor": (put("blk.0.ffn_sub_norm.weight", 32), r"blk.0.ffn_sub_norm.weight, which a llama"),
    "other rotary factors": (put("rope_freqs.weight", 4), r"rope_freqs.weight in another way than Llama 3.1"),
    "longrope": ({"more": LONGROPE}, r"scaling 'longrope': convert the model's safetensors"),
    "an attention factor": (
        {"more": lambda w: w.add_rope_scaling_attn_factors(1.5)},
        r"rope.scaling.attn_factor, which",
    ),
    "partial rotary embeddings": ({"more": lambda w: w.add_rope_dimension_count(4)}, r"rope.dimension_count 4 and"),
    "sliding windows": ({"more": lambda w: w.add_sliding_window(16)}, r"sliding-window attention, which a llama"),
    "a mixture of experts": ({"more": lambda w: w.add_expert_count(4)}, r"mixture of experts"),
    "NaN": ({"change": spoil}, r"up_proj.weight of .* not finite in bfloat16"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_carried_over_is_refused(tmp_path, case):
    options, words = REFUSALS[case]
    write_gguf(tmp_path / "m.gguf", small_llama(), **options)
    with pytest.raises(StochaError, match=words):
        convert(tmp_path / "m.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_another_architecture_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHS, "llama", "phi3")
    write_gguf(tmp_path / "m.gguf", small_llama())
    with pytest.raises(StochaError, match="architecture 'phi3': expected a dense gated model of llama, qwen2"):
        convert(tmp_path / "m.gguf", tmp_path / "out")


def test_a_truncated_file_is_refused(tmp_path):
    source = tmp_path / "model.gguf"
    write_gguf(source, small_llama())
    whole = source.read_bytes()
    for length in (len(whole) - 5000, 2000, 300, 30, 5, 0):
        source.write_bytes(whole[:length])
        with pytest.raises(StochaError, match=r"model.gguf cannot be read as GGUF"):
            check_gguf(source)
    assert_refused(call_command("stocha-convert", source, tmp_path / "out"), "model.gguf cannot be read as GGUF")
    assert not (tmp_path / "out").exists()


def test_counts_that_the_file_cannot_hold_are_refused_at_once(tmp_path):
    """2**40 tensors, metadata, characters or entries in a file of 150 bytes."""
    path, key = tmp_path / "m.gguf", struct.pack("<Q", 1) + b"k"
    huge = struct.pack("<Q", 2**40)
    start = b"GGUF" + struct.pack("<I", 3)
    claims = {
        "tensors": start + huge + struct.pack("<Q", 0),
        "metadata": start + struct.pack("<Q", 0) + huge,
        "a string": start + struct.pack("<QQ", 0, 1) + key + struct.pack("<I", 8) + huge,
        "numbers": start + struct.pack("<QQ", 0, 1) + key + struct.pack("<II", 9, 4) + huge,
        "strings": start + struct.pack("<QQ", 0, 1) + key + struct.pack("<II", 9, 8) + huge,
    }
    for data in claims.values():
        path.write_bytes(data.ljust(150, b"\0"))
        with pytest.raises(StochaError, match=f"{2**40} (entries|bytes) are announced"):
            read_gguf_header(path)


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    write_gguf(tmp_path / "m.gguf", small_llama())
    monkeypatch.setattr("stocha_hf.conversion.gguf._write_tensors", full)
    with pytest.raises(StochaError, match=r"cannot write .*out \(No space left on device\): free space"):
        convert(tmp_path / "m.gguf", tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


KILLED = """
import os, signal, sys
from stocha_hf.conversion import gguf
from stocha_hf.conversion.convert import convert
gguf._native = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow
def test_what_a_killed_conversion_leaves_is_swept_by_the_next(tmp_path):
    source, out = tmp_path / "m.gguf", tmp_path / "out"
    write_gguf(source, small_llama())
    assert run_warm(KILLED, source, out).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1 and not out.exists()
    convert(source, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "out"]
