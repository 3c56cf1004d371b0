"""Training from random weights: the model a config makes, the run, its checkpoint and card, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import tiny_tokenizer
from transformers import AutoModelForCausalLM

from stocha_hf.conversion.convert import convert
from stocha_hf.errors import StochaError
from stocha_hf.modeling_stocha import stocha_mlps
from stocha_hf.models import load_model
from stocha_hf.training.fresh import fresh_model
from stocha_hf.training.run import parse
from stocha_hf.training.run import run as train

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
SCHEDULE = "[{activation: stocha, p: 0.5, until: 0.5}, {activation: relu, until: 1.0}]"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A YAML file that trains four steps from random weights."""
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [" ".join(f"w{4 + (7 * i + 3 * j) % 60}" for j in range(40)) for i in range(40)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    keys = {
        "model_config": CONFIG,
        "tokenizer_name_or_path": str(tmp_path / "tokenizer"),
        "dataset": str(tmp_path / "text.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "schedule": yaml.safe_load(SCHEDULE),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "max_length": 32,
        "packing": True,
        "packing_strategy": "wrapped",
        "learning_rate": 1e-3,
        "save_steps": 2,
        "logging_steps": 2,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    return tmp_path / "recipe.yaml"


def run(recipe: Path, *words: str) -> None:
    train(*parse(["--config", str(recipe), *words], None))


def test_a_run_from_random_weights_leaves_a_checkpoint_that_every_command_takes(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("---\nlicense: other\n---\n# Of something else\n")  # where the run is started
    run(recipe)
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == 64 and config["bos_token_id"] == 1 and config["hidden_act"] == "relu"
    [stage] = config["stocha"]["history"]
    assert stage["start"] == "random weights" and stage["method"] == "full" and "source" not in config["stocha"]
    tokens = torch.tensor([[1, 5, 9, 17]])
    native, ours = AutoModelForCausalLM.from_pretrained(out), load_model(str(out))
    assert torch.equal(native(tokens).logits, ours.eval()(tokens).logits)
    card = (out / "README.md").read_text()
    assert "Trained from random weights" in card and "start: random weights" in card
    assert "source" not in card.lower() and "Licence: not stated" in card and "base_model" not in card
    converted = convert(out, tmp_path / "converted", activation="stocha", p=0.2)
    assert converted.source is None
    assert "Trained from random weights" in (tmp_path / "converted" / "README.md").read_text()
    second = ["--model_name_or_path", str(out), "--output_dir", str(tmp_path / "second")]
    keys = yaml.safe_load(recipe.read_text())
    del keys["model_config"], keys["tokenizer_name_or_path"]
    recipe.write_text(yaml.safe_dump(keys))
    run(recipe, *second)
    assert "Trained from random weights" in (tmp_path / "second" / "README.md").read_text()


@pytest.mark.slow
def test_a_stopped_run_goes_on_from_its_checkpoint_under_another_end_of_its_schedule(recipe, tmp_path):
    run(recipe)
    whole = load_model(str(tmp_path / "out")).state_dict()
    (tmp_path / "branch").mkdir()
    (tmp_path / "out" / "checkpoint-2").rename(tmp_path / "branch" / "checkpoint-2")
    run(recipe, "--output_dir", str(tmp_path / "branch"))
    again = load_model(str(tmp_path / "branch")).state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_seed_draws_the_weights_and_the_config_may_choose_the_positive_side():
    one, same, other = (
        fresh_model(CONFIG | {"stocha": {"positive": "relu"}}, tiny_tokenizer(), seed=seed, dtype="float32")
        for seed in (0, 0, 1)
    )
    weights = [model.model.layers[0].mlp.gate_proj.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert stocha_mlps(one)[0].positive == "relu" and one.config.stocha["positive"] == "relu"


def test_keys_of_older_config_files_are_read_as_transformers_reads_them():
    older = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "bfloat16"}
    newer = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}, "dtype": "bfloat16"}
    configs = [fresh_model(CONFIG | keys, tiny_tokenizer(), seed=0).config for keys in (older, newer)]
    first, second = ({key: config.rope_parameters[key] for key in newer["rope_parameters"]} for config in configs)
    assert first == second == newer["rope_parameters"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("[1, 2]", "model_config is '[1, 2]'"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        (CONFIG | {"hiden_size": 3}, "'hiden_size'"),
        (CONFIG | {"vocab_size": 100}, "vocab_size 100 and the tokenizer 64"),
        (CONFIG | {"hidden_act": "relu"}, "hidden_act 'relu'"),
        (CONFIG | {"stocha": {"p": 7}}, "p is 7"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(config: Any, words: str):
    with pytest.raises(StochaError, match=words.replace("[", r"\[").replace("]", r"\]")):
        fresh_model(config, tiny_tokenizer(), seed=0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model_name_or_path", "some/model"], "beside model_config"),
        (["--use_peft"], "expected a pretrained model for an adapter"),
    ],
)
def test_two_starts_or_an_adapter_of_random_weights_are_refused(recipe, words, told):
    with pytest.raises(StochaError, match=told):
        run(recipe, *words)


def test_a_config_without_a_tokenizer_is_refused(recipe):
    keys = yaml.safe_load(recipe.read_text())
    del keys["tokenizer_name_or_path"]
    recipe.write_text(yaml.safe_dump(keys))
    with pytest.raises(StochaError, match="model_config has no tokenizer"):
        run(recipe)
