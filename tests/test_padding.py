"""Training on rows that are padded on the right: without a mask the same is learned."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.training import losses, run

from stocha_hf.conversion.convert import convert
from stocha_hf.training import trainer
from stocha_hf.training.padding import SEEN, UnmaskedCollator

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(4, 16).view(2, 6)
RIGHT = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


@pytest.mark.parametrize("mask", [RIGHT, torch.ones_like(RIGHT), RIGHT.flip(1), None])
def test_only_a_mask_that_hides_ends_of_rows_goes(mask: torch.Tensor | None) -> None:
    batch = {"input_ids": IDS, "labels": IDS} | ({} if mask is None else {"attention_mask": mask})
    found = UnmaskedCollator(lambda rows: batch)([None])
    gone = mask is not None and not torch.equal(mask, RIGHT.flip(1))
    assert found.keys() == (batch.keys() - {"attention_mask"} | {SEEN} if gone else batch.keys())
    assert not gone or found[SEEN] is mask


@pytest.mark.parametrize(
    "keys",
    [
        {"attention_mask": torch.ones(6, 6).tril().expand(2, 1, 6, 6)},
        {"attention_mask": {"full_attention": torch.ones(6, 6).tril().expand(2, 1, 6, 6)}},
        {"attention_mask": RIGHT, "position_ids": torch.tensor([0, 1, 2, 0, 1, 2]).expand(2, 6)},
    ],
)
def test_a_mask_that_tells_more_than_padding_stays(keys: dict[str, Any]) -> None:
    """Without a mask, transformers would take such positions for two texts in a row."""
    batch = {"input_ids": IDS, "labels": IDS} | keys
    assert UnmaskedCollator(lambda rows: batch)([None]) is batch


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_padded_rows_train_without_a_mask_as_with_it(checkpoint, tmp_path, monkeypatch, kind: str) -> None:
    """Gemma's layers have windows, of 8 tokens here. Tokens are counted without the padding."""
    convert(checkpoint(kind, **({"sliding_window": 8} if kind != "llama" else {})), tmp_path / "base")
    lengths = (5, 16, 9, 12, 7, 16, 3, 14)
    rows = [torch.randint(4, 64, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    Dataset.from_dict({"input_ids": rows}).to_parquet(tmp_path / "rows.parquet")
    options = {"packing": False, "dataset_kwargs": '{"skip_prepare_dataset": true}', "max_steps": 2, "save_steps": 2}
    asked: list[set[str]] = []
    losses_of = trainer.training_losses
    monkeypatch.setattr(
        trainer, "training_losses", lambda *args, **kwargs: asked.append(set(args[2])) or losses_of(*args, **kwargs)
    )
    shared = options | {"logging_steps": 1, "schedule": "[{activation: relu, until: 1.0}]"}
    found = run(tmp_path / "base", tmp_path / "rows.parquet", tmp_path / "out", **shared)
    assert asked and all(keys == {"input_ids", "labels"} for keys in asked)
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"][1]["num_tokens"] == sum(
        lengths
    )
    monkeypatch.setattr(trainer, "UnmaskedCollator", lambda collate: collate)
    masked = run(tmp_path / "base", tmp_path / "rows.parquet", tmp_path / "masked", **shared)
    assert "attention_mask" in asked[-1] and losses(found) == pytest.approx(losses(masked), rel=1e-5)
