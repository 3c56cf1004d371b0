"""Export to vLLM and PowerInfer: what the folder or file holds computes what the checkpoint does.

test_vllm.py takes the steps of vLLM's backend. PowerInfer's are taken here, from the file's own tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers import call_command, tiny_model
from helpers.vocabularies import byte_level_tokenizer
from transformers import AutoModelForCausalLM

import stocha_hf
from stocha_hf.conversion.export_predictors import THRESHOLD, fit, judge
from stocha_hf.errors import StochaError

TOKENS = torch.tensor([[1, 5, 9, 17, 28, 4, 8, 30]])


def converted(where: Path, model_type: str = "llama", cut: str = "gpt-2", model: Any = None, **options: Any) -> Path:
    model = tiny_model(model_type, vocab_size=320, **(model or {}))
    model.save_pretrained(where / "native")
    byte_level_tokenizer(cut).save_pretrained(where / "native")
    stocha_hf.convert(where / "native", where / "out", **options)
    return where / "out"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    words = np.random.default_rng(0).choice(["the", "then", "red", "x1", "sea", "+"], size=3000)
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join(part) for part in words.reshape(30, -1)))
    return tmp_path / "text.txt"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("model_type", "options", "end"),
    [
        ("llama", {"activation": "relu"}, "--model-impl transformers"),
        ("gemma3_text", {"activation": "relu2"}, "--model-impl transformers"),
        ("qwen2", {"p": 0.3}, ""),  # infers with SiLU: vLLM's own class
    ],
)
def test_vllm_gets_the_native_class_where_that_computes_the_activation(tmp_path, model_type, options, end):
    folder = converted(tmp_path, model_type, **options)
    done = stocha_hf.export(folder, tmp_path / "vllm", format="vllm")
    config = config_of(tmp_path / "vllm")
    assert not {"auto_map", "model_file", "stocha"} & config.keys()
    assert config["architectures"] == config_of(tmp_path / "native")["architectures"] == [done.architecture]
    assert done.command == f"vllm serve {tmp_path / 'vllm'} {end}".strip() and done.approximation is None
    assert not list((tmp_path / "vllm").glob("*.py"))
    card = (tmp_path / "vllm" / "README.md").read_text()
    assert done.command in card and ("wrong, without a word" in card) == bool(end)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, tmp_path / "vllm"))
    with torch.no_grad():
        assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)


def test_vllm_gets_remote_code_for_what_no_native_class_computes(tmp_path):
    folder = converted(tmp_path, activation="fatrelu", threshold=0.2)
    done = stocha_hf.export(folder, tmp_path / "vllm", format="vllm")
    assert (done.architecture, done.activation) == ("StochaLlamaForCausalLM", "fatrelu")
    assert done.command.endswith("--trust-remote-code") and (tmp_path / "vllm" / "modeling_stocha.py").exists()
    assert config_of(tmp_path / "vllm") == config_of(folder)
    done = stocha_hf.export(folder, tmp_path / "plain", format="vllm", activation="relu")
    assert done.architecture == "LlamaForCausalLM" and "relu in place of fatrelu" in str(done.approximation)
    with pytest.raises(StochaError, match="precision f16 was given with format vllm"):
        stocha_hf.export(folder, tmp_path / "x", format="vllm", precision="f16")


def test_vllm_cuts_no_inputs(tmp_path):
    folder = converted(tmp_path, activation="fatrelu", threshold=0.2)
    config = config_of(folder)
    config["stocha"]["inputs"] = {"thresholds": {"q_proj": [0.1, 0.1]}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(StochaError, match="cuts the inputs of its projections, which vLLM does not"):
        stocha_hf.export(folder, tmp_path / "vllm", format="vllm")
    done = stocha_hf.export(folder, tmp_path / "vllm", format="vllm", activation="fatrelu")
    assert "inputs" not in config_of(tmp_path / "vllm")["stocha"] and "without the cuts" in str(done.approximation)


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and tensors of PowerInfer's file, which the package gguf reads but for its first four bytes."""
    data = path.read_bytes()
    assert data[:4] == b"PWRI"
    path.with_suffix(".gguf2").write_bytes(b"GGUF" + data[4:])
    reader = gguf.GGUFReader(path.with_suffix(".gguf2"))
    values = {key: field.contents() for key, field in reader.fields.items()}
    return values, {t.name: torch.tensor(t.data.astype(np.float32)) for t in reader.tensors}


def test_powerinfer_s_steps_give_the_ffn_of_the_neurons_that_it_predicts(tmp_path, text, capsys):
    folder = converted(tmp_path, activation="relu", model={"tie_word_embeddings": True})
    (tmp_path / "m.gguf").write_bytes(b"PWRI")  # of an earlier export
    options = ["--format", "powerinfer", "--data", text, "--rank", 32, "--overwrite", "--json"]
    done = json.loads(call_command("export", folder, tmp_path / "m.gguf", *options).stdout)
    values, tensors = read(tmp_path / "m.gguf")
    assert values["general.architecture"] == "llama" and values["powerinfer.sparse_threshold"] == THRESHOLD
    assert done["precision"] == "f16" and done["approximation"] is None and done["predictors"]["rank"] == 32
    assert torch.equal(tensors["output.weight"], tensors["token_embd.weight"])  # PowerInfer ties none
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    mlp = model.model.layers[1].mlp
    x = torch.randn(50, 32)
    gate, up, down_t, fc1, fc2 = (
        tensors[f"blk.1.{name}.weight"] for name in ("ffn_gate", "ffn_up", "ffn_down_t", "fc1", "fc2")
    )
    assert down_t.shape == (48, 32) and fc1.shape == (64, 32) and fc2.shape == (48, 64)
    predicted = torch.relu(x @ fc1.T) @ fc2.T >= THRESHOLD
    found = (predicted * torch.relu(x @ gate.T) * (x @ up.T)) @ down_t
    with torch.no_grad():
        expected = mlp(x)
    # a predictor of full rank knows the gate: what it leaves out is small
    assert (found - expected).norm() < 0.05 * expected.norm() < (expected * 0.06).norm()
    assert done["predictors"]["recall"] > 0.95 and 0 < done["predictors"]["predicted_sparsity"] < 1


def test_a_predictor_s_rank_buys_recall_at_equal_sparsity_and_its_threshold_is_shared():
    torch.manual_seed(0)
    inputs = torch.randn(4000, 64) * torch.logspace(0, -3, 64)  # that vary along few directions
    gate = torch.randn(96, 64)
    rows = [judge(gate, fit(gate, inputs[:3000], rank), inputs[3000:]) for rank in (4, 16, 64)]
    skipped = [row[1].item() for row in rows]
    assert skipped[0] < skipped[1] < skipped[2]  # recall is what was asked for, more is skipped
    assert all(row[0] > 0.96 for row in rows)
    assert rows[2][1] > 0.9 * rows[2][2]


@pytest.mark.parametrize(
    ("model_type", "options", "words"),
    [
        ("qwen2", {}, "is a qwen2"),
        ("llama", {"mlp_bias": True}, "has layers.0.mlp.gate_proj.bias"),
        ("llama", {"head_dim": 16}, "has heads of 16 entries"),
    ],
)
def test_models_that_powerinfer_lacks_are_refused(tmp_path, text, model_type, options, words):
    folder = converted(tmp_path, model_type, activation="relu", model=options)
    with pytest.raises(StochaError, match=f"PowerInfer computes a plain Llama with ReLU, and out {words}: expected a"):
        stocha_hf.export(folder, tmp_path / "m.gguf", format="powerinfer", data=text)
    assert not (tmp_path / "m.gguf").exists()


def test_options_that_a_format_does_not_take_or_lacks(tmp_path, text):
    folder = converted(tmp_path, p=0.3)
    for options, words in (
        ({"format": "powerinfer"}, "without data: expected text"),
        ({"format": "powerinfer", "data": text, "precision": "q8_0"}, "precision is 'q8_0': expected f16"),
        ({"format": "powerinfer", "data": text}, "infers with silu, and PowerInfer computes relu: pass --activation"),
        ({"format": "powerinfer", "data": text, "activation": "relu", "rank": 99}, "rank is 99: expected 1 to 32"),
        ({"data": text}, "given with format gguf: expected format powerinfer"),
    ):
        with pytest.raises(StochaError, match=words):
            stocha_hf.export(folder, tmp_path / "m.gguf", **options)
    done = stocha_hf.export(folder, tmp_path / "m.gguf", format="powerinfer", data=text, activation="relu")
    assert "relu in place of silu" in str(done.approximation)
