"""Training under input cuts: thresholds that follow what training moves, in checkpoints too, and compile nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from helpers.training import SILU, losses, run
from torch._dynamo.utils import counters

from stocha_hf.cuts import InputCuts
from stocha_hf.cuts_stocha import cut_projections
from stocha_hf.errors import StochaError
from stocha_hf.modeling_stocha import StochaConfig
from stocha_hf.models import load_model
from stocha_hf.patching import patch
from stocha_hf.training.compiled_layers import compile_layers
from stocha_hf.training.entry import change_entry
from stocha_hf.training.held_inputs import HeldInputs
from stocha_hf.training.trainer import StochaTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {
    "schedule": SILU,
    "save_steps": 4,
    "logging_steps": 1,
    "learning_rate": 3e-2,
}  # at which inputs move in few steps
SOME = ("q_proj", "o_proj", "down_proj")


def cut_model(layers: int = 2) -> Any:
    model = tiny_model(num_hidden_layers=layers)
    limits = {name: [0.2 + 0.1 * layer for layer in range(layers)] for name in SOME}
    patch(model, StochaConfig(activation="silu", inputs=InputCuts(limits, share=0.3, train=True)))
    return model


@pytest.fixture
def cutting(tmp_path: Path) -> Path:
    folder = tmp_path / "cutting"
    cut_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def shares(folder: Path, text: Path) -> list[float]:
    """The share of its inputs that each projection cuts on the text."""
    rows = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    tokens = torch.tensor(tiny_tokenizer()(rows)["input_ids"])
    held = HeldInputs()
    held.begin(load_model(str(folder)), [{"input_ids": tokens}])
    assert held.shares is not None
    return [share for name in SOME for share in held.shares[name]]


def inputs(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["stocha"]["inputs"]


@pytest.mark.slow
def test_each_projection_goes_on_cutting_its_share(
    cutting: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = run(cutting, text, tmp_path / "held", **OPTIONS)
    before = torch.tensor(shares(cutting, text))
    held = (torch.tensor(shares(tmp_path / "held", text)) - before).abs()
    assert max(held) < 0.03 and before.min() < before.max() - 0.2  # each its own
    assert inputs(tmp_path / "held")["thresholds"] == inputs(tmp_path / "held" / "checkpoint-8")["thresholds"]
    assert inputs(tmp_path / "held")["thresholds"] != inputs(tmp_path / "held" / "checkpoint-4")["thresholds"]
    stage = json.loads((tmp_path / "held" / "config.json").read_text())["stocha"]["history"][-1]
    assert stage["input_thresholds"] == "held to their shares" and "inputs_cut" in history[0]

    shutil.rmtree(tmp_path / "held" / "checkpoint-8")
    assert losses(run(cutting, text, tmp_path / "held", **OPTIONS)) == losses(history)  # resumed with step 4's
    assert (torch.tensor(shares(tmp_path / "held", text)) - before).abs().tolist() == held.tolist()

    monkeypatch.setattr(StochaTrainer, "holds_inputs", False)
    run(cutting, text, tmp_path / "fixed", **OPTIONS)
    assert inputs(tmp_path / "fixed") == inputs(cutting)
    assert max((torch.tensor(shares(tmp_path / "fixed", text)) - before).abs()) > 2 * max(held)


def test_a_part_of_an_entry_that_the_model_cannot_have_changes_nothing() -> None:
    model = cut_model()
    before = [module.input_threshold for module in cut_projections(model)]
    with pytest.raises(StochaError, match=r"inputs\.thresholds\.q_proj"):
        change_entry(model, inputs={"thresholds": {name: [0.5] for name in SOME}})
    with pytest.raises(StochaError, match="cuts the inputs of q_proj, o_proj, down_proj: expected thresholds for"):
        change_entry(model, inputs={"thresholds": {"q_proj": [0.5, 0.5]}})
    assert [module.input_threshold for module in cut_projections(model)] == before
    change_entry(model, inputs={"thresholds": {name: [0.5, 0.6] for name in SOME}})
    assert [module.input_threshold for module in cut_projections(model)] == [0.5] * 3 + [0.6] * 3


@pytest.mark.slow
def test_one_compiled_layer_serves_all_layers_and_all_thresholds(fresh_compiler: None) -> None:
    model = cut_model(layers=3).train()
    tokens = torch.arange(4, 20).view(2, 8)
    before = model(tokens, use_cache=False).logits
    undo = compile_layers(model, backend="eager")
    counters.clear()
    assert torch.allclose(model(tokens, use_cache=False).logits, before, atol=1e-5)
    for step in range(3):
        limits = {name: [0.1 * ((step + layer) % 3) for layer in range(3)] for name in SOME}  # 0 in each layer
        change_entry(model, inputs={"thresholds": limits, "train": True})
        after = model(tokens, use_cache=False).logits
        after.sum().backward()
    assert counters["stats"]["unique_graphs"] == 2  # numbers as they are, and any numbers
    undo()
    assert torch.allclose(model(tokens, use_cache=False).logits, after, atol=1e-5)
