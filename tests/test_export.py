"""Export to GGUF: what the file holds is the model, as llama.cpp reads it. benchmarks/export_gguf.py runs llama.cpp.

A native architecture is read back by this package's own reader. The one with a gated ReLU, which that reader does not
know, is compared with the checkpoint tensor by tensor.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers import assert_refused, call_command, run_warm, tiny_model
from helpers.vocabularies import CUTS, byte_level_tokenizer, sentencepiece_tokenizer
from tokenizers import models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM

import stocha_hf
from stocha_hf.conversion.export_metadata import plan_metadata
from stocha_hf.conversion.export_tensors import FileTensor
from stocha_hf.conversion.export_vocabulary import vocabulary
from stocha_hf.conversion.gguf import check_gguf
from stocha_hf.conversion.gguf_header import read_gguf_header
from stocha_hf.errors import StochaError

VOCAB = 320
TOKENS = torch.tensor([[1, 5, 9, 17, 28, 4, 8, 30]])


def folder_of(
    where: Path, model_type: str = "llama", *, tokenizer: Any = None, dtype: Any = torch.float32, **options: Any
) -> Path:
    """A native folder, with norms and biases that are not trivial."""
    model = tiny_model(model_type, vocab_size=VOCAB, **options)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(where / "source")
    (tokenizer or sentencepiece_tokenizer()).save_pretrained(where / "source")
    (where / "source" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n")
    return where / "source"


def relu_folder(where: Path, **options: Any) -> Path:
    stocha_hf.convert(folder_of(where, **options), where / "relu", activation="relu")
    return where / "relu"


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and tensors as the package gguf reads them."""
    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    return values, {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {"tokenizer": byte_level_tokenizer("qwen2")}),
        ("qwen3", {"tokenizer": byte_level_tokenizer("qwen2")}),
        ("gemma2", {"sliding_window": 4}),
        ("gemma3_text", {"sliding_window": 4}),
    ],
)
def test_a_model_with_its_own_activation_is_read_back_as_it_was(tmp_path, model_type, options):
    source = folder_of(tmp_path, model_type, **options)
    done = stocha_hf.export(source, tmp_path / "m.gguf")
    assert (done.precision, done.approximation) == ("f32", None)
    assert done.bytes == (tmp_path / "m.gguf").stat().st_size
    stocha_hf.convert(tmp_path / "m.gguf", tmp_path / "back", dtype="float32")
    model, back = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "back"))
    with torch.no_grad():
        torch.testing.assert_close(back(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)


ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    | {"original_max_position_embeddings": 8192},
}


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_rotary_embeddings_are_read_back(tmp_path, kind):
    options = {"rope_parameters": ROPES[kind], "head_dim": 64, "max_position_embeddings": 16384}
    source = folder_of(tmp_path, **options)
    stocha_hf.export(source, tmp_path / "m.gguf")
    assert check_gguf(tmp_path / "m.gguf").config["rope_parameters"] == ROPES[kind]


@pytest.mark.parametrize(
    ("model_type", "options"), [("llama", {}), ("mistral", {"sliding_window": 32}), ("qwen2", {})]
)
def test_a_relu_model_is_a_mixture_of_one_expert(tmp_path, model_type, options):
    folder = relu_folder(tmp_path, model_type=model_type, **options)
    done = stocha_hf.export(folder, tmp_path / "m.gguf")
    assert (done.architecture, done.activation, done.approximation) == ("smallthinker", "relu", None)
    values, tensors = read(tmp_path / "m.gguf")
    own = {
        key.removeprefix("smallthinker."): value for key, value in values.items() if key.startswith("smallthinker.")
    }
    assert own["expert_count"] == own["expert_used_count"] == own["expert_gating_func"] == 1
    assert own["expert_feed_forward_length"] == own["feed_forward_length"] == 48
    assert own["context_length"] == options.get("sliding_window", 64)  # as far as a window makes no difference
    assert "attention.sliding_window" not in own  # which would change every fourth layer's rotary embeddings
    told = [values[f"general.{key}"] for key in ("name", "license", "languages")]
    assert values["stocha.activation"] == "relu" and told == ["relu", "apache-2.0", ["en"]]
    model = AutoModelForCausalLM.from_pretrained(folder)
    layer = model.model.layers[1]
    for name, module in {
        "attn_q": layer.self_attn.q_proj, "attn_k": layer.self_attn.k_proj, "attn_output": layer.self_attn.o_proj,
        "ffn_gate_exps": layer.mlp.gate_proj, "ffn_up_exps": layer.mlp.up_proj, "ffn_down_exps": layer.mlp.down_proj,
        "attn_norm": layer.input_layernorm, "ffn_norm": layer.post_attention_layernorm,
    }.items():  # fmt: skip
        found = tensors.pop(f"blk.1.{name}.weight")
        assert found.shape[0] == 1 or "exps" not in name
        assert np.array_equal(found.reshape(module.weight.shape), module.weight.detach().numpy()), name
    router = tensors["blk.1.ffn_gate_inp.weight"]
    assert router.shape == (1, 32) and not router.any()
    assert ("blk.0.attn_q.bias" in tensors) == (model_type == "qwen2")
    assert not any("ffn_gate.weight" in name or "ffn_up.weight" in name for name in tensors)
    assert np.array_equal(tensors["output.weight"], model.lm_head.weight.detach().numpy())


@pytest.mark.parametrize("precision", [None, "f16", "q8_0"])
def test_precisions(tmp_path, precision):
    folder = relu_folder(tmp_path, dtype=torch.bfloat16)
    done = stocha_hf.export(folder, tmp_path / "m.gguf", precision=precision)
    assert done.precision == (precision or "bf16")
    header = read_gguf_header(tmp_path / "m.gguf")
    types = {name: gguf.GGMLQuantizationType(tensor.type).name.lower() for name, tensor in header.tensors.items()}
    assert types["output_norm.weight"] == types["blk.0.ffn_gate_inp.weight"] == "f32"
    assert types["token_embd.weight"] == types["blk.0.ffn_gate_exps.weight"] == done.precision
    assert types["blk.0.ffn_down_exps.weight"] == ("f16" if precision == "q8_0" else done.precision)  # rows of 48
    _, tensors = read(tmp_path / "m.gguf")
    weight = AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj.weight.float().detach().numpy()
    error = np.abs(tensors["blk.0.ffn_up_exps.weight"][0] - weight).max()
    assert error <= {None: 0, "f16": 2**-11, "q8_0": 0.6 / 127}[precision] * np.abs(weight).max()


@pytest.mark.parametrize(
    ("model_type", "options", "words"),
    [
        ("qwen3", {}, "is a qwen3, whose norms it lacks: expected a llama, mistral, qwen2"),
        ("gemma2", {"sliding_window": 4}, "is a gemma2, whose norms"),
        ("llama", {"attention_bias": True}, "self_attn.o_proj.bias, which it lacks"),
        ("llama", {"mlp_bias": True}, "mlp.gate_proj.bias, which it lacks"),
        ("llama", {"rope_parameters": ROPES["llama3"], "head_dim": 64}, "rotary factors, which it lacks"),
    ],
)
def test_relu_models_that_the_one_architecture_cannot_hold_are_refused(tmp_path, model_type, options, words):
    folder = relu_folder(tmp_path, model_type=model_type, **options)
    with pytest.raises(StochaError, match=f"in its architecture smallthinker alone.*{words}"):
        stocha_hf.export(folder, tmp_path / "m.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["relu", "source"]


@pytest.mark.parametrize(
    ("model_type", "changes", "key"),
    [
        ("llama", {"rope_parameters": {**ROPES["yarn"], "beta_fast": 16.0}}, "rope_parameters"),
        ("gemma2", {"query_pre_attn_scalar": 5}, "query_pre_attn_scalar"),
        ("gemma3_text", {"layer_types": ["full_attention", "full_attention"]}, "layer_types"),
    ],
)
def test_settings_that_the_file_cannot_hold_are_refused(model_type, changes, key):
    config = tiny_model(model_type).config.to_dict() | changes
    with pytest.raises(StochaError, match=f"m has {key} .*, where llama.cpp's"):
        plan_metadata(config, "own", "m")


def test_another_activation_needs_to_be_asked_for_and_the_result_says_what_it_changes(tmp_path):
    stocha_hf.convert(folder_of(tmp_path), tmp_path / "fat", activation="fatrelu", threshold=0.2)
    with pytest.raises(StochaError, match=r"fat infers with fatrelu, .*: pass --activation relu .* --mode relu"):
        stocha_hf.export(tmp_path / "fat", tmp_path / "m.gguf")
    done = stocha_hf.export(tmp_path / "fat", tmp_path / "m.gguf", activation="relu")
    assert done.architecture == "smallthinker" and "relu in place of fatrelu" in str(done.approximation)
    done = stocha_hf.export(tmp_path / "fat", tmp_path / "n.gguf", activation="silu")
    assert done.architecture == "llama" and "silu in place of fatrelu" in str(done.approximation)


def test_cuts_of_inputs_are_left_out_if_that_is_asked_for(tmp_path):
    folder = relu_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["stocha"]["inputs"] = {"thresholds": {"q_proj": [0.1, 0.1]}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(StochaError, match=r"cuts the inputs of its projections, .*: pass --activation relu to export"):
        stocha_hf.export(folder, tmp_path / "m.gguf")
    done = stocha_hf.export(folder, tmp_path / "m.gguf", activation="relu")
    assert str(done.approximation).startswith("exported without the cuts of relu's inputs")


@pytest.mark.parametrize("cut", CUTS)
def test_a_byte_level_vocabulary_is_named_by_how_it_cuts_a_text(cut):
    tokenizer = byte_level_tokenizer(cut)
    found = vocabulary(tokenizer, 300, "m")
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", cut)
    assert found["tokenizer.ggml.merges"] == ["t h", "th e"]
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 300
    assert tokens[:3] == ["<pad>", "<s>", "</s>"] and kinds[:3] == [3, 3, 3]
    assert tokens[tokenizer.convert_tokens_to_ids("the")] == "the" and kinds[260] == 1
    assert tokens[299] == "[PAD299]" and kinds[299] == 5
    assert [found[f"tokenizer.ggml.{name}_token_id"] for name in ("padding", "bos", "eos")] == [0, 1, 2]
    assert found["tokenizer.ggml.add_bos_token"] is found["tokenizer.ggml.add_eos_token"] is False
    assert found["tokenizer.chat_template"] == tokenizer.chat_template


def test_a_sentencepiece_vocabulary_scores_the_earliest_merge_highest():
    tokenizer = sentencepiece_tokenizer()
    found = vocabulary(tokenizer, VOCAB, "m")
    ids = tokenizer.get_vocab()
    kinds, scores = found["tokenizer.ggml.token_type"], found["tokenizer.ggml.scores"]
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is True
    assert [kinds[ids[name]] for name in ("<s>", "<unk>", "<0x0A>", "th", "[x]")] == [3, 2, 6, 1, 4]
    assert scores[ids["th"]] > scores[ids["\u2581th"]] > scores[ids["a"]]
    tokens = found["tokenizer.ggml.tokens"]
    assert (tokens[ids["\u2581th"]], tokens[ids["[x]"]]) == ("\u2581th", "[x]")
    assert vocabulary(sentencepiece_tokenizer(first=False), VOCAB, "m")["tokenizer.ggml.add_space_prefix"] is False


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, r"cuts a text by \{'type': 'Whitespace'\}"),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "cuts a text by .*add_prefix_space"),
        ({"normalizer": normalizers.Lowercase()}, "cuts a text by Lowercase, ByteLevel"),
        ({"model": models.WordLevel({"a": 0}, "a")}, "is of the type WordLevel"),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_have_are_refused(parts, words):
    with pytest.raises(StochaError, match=f"the tokenizer of m {words}.*, which llama.cpp does not support: expected"):
        vocabulary(byte_level_tokenizer(**parts), VOCAB, "m")
    with pytest.raises(StochaError, match="has the token 260: expected at most the 200 of its model"):
        vocabulary(byte_level_tokenizer(), 200, "m")


def test_lower_precisions_are_made_by_llama_cpp_s_program(tmp_path, monkeypatch):
    folder = relu_folder(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StochaError, match=r"q4_k_m is made by llama.cpp's llama-quantize, .*: install llama.cpp"):
        stocha_hf.export(folder, tmp_path / "m.gguf", precision="q4_k_m")
    program = tmp_path / "llama-quantize"
    program.write_text('#!/bin/sh\necho "$3" > "${0}d"\nexec /bin/cp "$1" "$2"\n')
    program.chmod(0o755)
    assert stocha_hf.export(folder, tmp_path / "m.gguf", precision="q4_k_m").precision == "q4_k_m"
    assert (tmp_path / "llama-quantized").read_text() == "Q4_K_M\n"
    program.write_text("#!/bin/sh\necho first >&2\necho unknown type >&2\nexit 1\n")
    with pytest.raises(StochaError, match=r"llama-quantize failed \(unknown type\)"):
        stocha_hf.export(folder, tmp_path / "n.gguf", precision="q4_0")
    assert not (tmp_path / "n.gguf").exists() and not list(tmp_path.glob(".*"))


def test_the_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    folder, out = relu_folder(tmp_path), tmp_path / "new" / "m.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(FileTensor, "packed", lambda self: os.write(-1, b""))
        with pytest.raises(StochaError, match="Bad file descriptor"):
            stocha_hf.export(folder, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["relu", "source"]
    stocha_hf.export(folder, out)
    first = out.read_bytes()
    with pytest.raises(StochaError, match=r"m.gguf exists: expected a new file; .* --overwrite"):
        stocha_hf.export(folder, out)
    stocha_hf.export(folder, out, overwrite=True)
    assert out.read_bytes() == first
    out.write_bytes(b"letters")
    with pytest.raises(StochaError, match="is not a GGUF file: expected one to overwrite"):
        stocha_hf.export(folder, out, overwrite=True)
    assert out.read_bytes() == b"letters" and not list(out.parent.glob(".*"))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    source = folder_of(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    model.save_pretrained(source)
    with pytest.raises(StochaError, match=r"blk.0.ffn_up.weight has values that are not finite in f16"):
        stocha_hf.export(source, tmp_path / "m.gguf", precision="f16")
    assert not (tmp_path / "m.gguf").exists()


def test_the_command(tmp_path):
    folder = relu_folder(tmp_path)
    done = call_command("stocha-export", folder, tmp_path / "m.gguf", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["command"] == f"llama-cli -m {tmp_path / 'm.gguf'}"
    done = call_command("stocha-export", folder, tmp_path / "n.gguf", "--activation", "silu")
    assert "silu in place of relu" in done.stdout and "llama-cli -m" in done.stdout
    assert_refused(call_command("stocha-export", folder, tmp_path / "n.gguf"), "n.gguf exists", "--overwrite")


KILLED = """
import os, signal, sys, stocha_hf
from stocha_hf.conversion.export_tensors import FileTensor
FileTensor.packed = lambda self: os.kill(os.getpid(), signal.SIGKILL)
stocha_hf.export(sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow
def test_what_a_killed_export_leaves_is_swept_by_the_next(tmp_path):
    folder, out = relu_folder(tmp_path), tmp_path / "m.gguf"
    assert run_warm(KILLED, folder, out).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".m.gguf.partial-*"))) == 1 and not out.exists()
    stocha_hf.export(folder, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "relu", "source"]
