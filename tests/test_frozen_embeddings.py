"""`train_embeddings: false`: embeddings and a tied head stay as they are, whatever else a run does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from helpers.training import SILU, losses, run
from safetensors.torch import load_file

from stocha_hf.conversion.convert import convert
from stocha_hf.errors import StochaError
from stocha_hf.modeling_stocha import StochaConfig
from stocha_hf.patching import patch
from stocha_hf.training.arguments import StochaArguments
from stocha_hf.training.frozen_embeddings import freeze_embeddings

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS: dict[str, Any] = {
    "schedule": SILU,
    "train_embeddings": False,
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
}
EMBEDDINGS = "model.embed_tokens.weight"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_a_tied_head_stay_and_have_no_state(
    checkpoint: Any, text: Path, tmp_path: Path, tied: bool
) -> None:
    base, out = tmp_path / "start", tmp_path / "out"
    convert(checkpoint(tie_word_embeddings=tied), base)
    before = tensors(base)
    run(base, text, out, weight_decay=0.1, **OPTIONS)
    for folder in (out, out / "checkpoint-2"):
        after = tensors(folder)
        assert after.keys() == before.keys() and torch.equal(after[EMBEDDINGS], before[EMBEDDINGS])
        assert all(not torch.equal(after[name], before[name]) for name in before if name != EMBEDDINGS)
    states = torch.load(out / "checkpoint-4" / "optimizer.pt")["state"].values()
    assert len(states) == len(before) - 1
    [stage] = json.loads((out / "config.json").read_text())["stocha"]["history"]
    assert stage["train_embeddings"] is False


@pytest.mark.slow
def test_learned_thresholds_checkpointing_and_resuming_with_it(
    checkpoint: Any, base: Path, text: Path, tmp_path: Path
) -> None:
    cut, out = tmp_path / "cut", tmp_path / "out"
    convert(
        checkpoint(tie_word_embeddings=True), cut, activation="silu", inputs=0.4, calibrate=text, inputs_train=True
    )
    options = OPTIONS | {
        "input_thresholds": "learned",
        "teacher": base,
        "distill_weight": 1.0,
        "distill_vocabulary": 20,
        "distill_hidden": 1.0,
    }
    plain = losses(run(cut, text, tmp_path / "plain", **options))
    options |= {"gradient_checkpointing": True}
    history = losses(run(cut, text, out, **options))
    assert history == pytest.approx(plain, rel=1e-4)
    for folder in (out, out / "checkpoint-2"):
        assert torch.equal(tensors(folder)[EMBEDDINGS], tensors(cut)[EMBEDDINGS])
    shutil.rmtree(out / "checkpoint-4")
    assert losses(run(cut, text, out, **options)) == history


def test_a_reentrant_checkpoint_passes_gradients_on(base: Path, text: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"max_steps": 2, "weight_decay": 0}
    plain = run(base, text, tmp_path / "plain", **options)
    kwargs = '{"use_reentrant": true}'
    same = run(
        base, text, tmp_path / "o", gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs, **options
    )
    assert losses(same) == pytest.approx(losses(plain)) and losses(plain)[0] != losses(plain)[1]


def test_what_was_frozen_takes_gradients_again() -> None:
    model = tiny_model()
    patch(model, StochaConfig())
    close = freeze_embeddings(model)
    ids = torch.tensor([[1, 5, 9]])
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad is None and model.model.layers[0].self_attn.q_proj.weight.grad.any()
    close()
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad.any() and not model.model.embed_tokens._forward_hooks


def test_an_adapter_is_refused(base: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(StochaError, match="train_embeddings is false and use_peft true"):
        run(base, text, tmp_path / "none", use_peft=True, **OPTIONS)


def test_random_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StochaError, match="train_embeddings is false beside model_config"):
        StochaArguments(output_dir=str(tmp_path), model_config={"model_type": "llama"}, train_embeddings=False)


def test_a_checkpoint_that_trained_them_is_not_gone_on_from(base: Path, text: Path, tmp_path: Path) -> None:
    """Nor the other way round: the optimizer's state is of other weights."""
    for first in (True, False):
        out = tmp_path / str(first)
        run(base, text, out, **OPTIONS | {"train_embeddings": first})
        shutil.rmtree(out / "checkpoint-4")
        with pytest.raises(StochaError, match=f"train_embeddings is {'false' if first else 'true'}, which it was not"):
            run(base, text, out, **OPTIONS | {"train_embeddings": not first})
