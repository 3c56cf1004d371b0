"""Training as a fallback decodes: where the teacher is in doubt, and what is not cut then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from helpers.training import SILU, run
from torch import nn

from stocha_hf.cuts import PROJECTIONS, InputCuts
from stocha_hf.errors import StochaError
from stocha_hf.modeling_stocha import StochaConfig
from stocha_hf.patching import patch
from stocha_hf.training.doubts import in_doubt
from stocha_hf.training.some_words import SomeWords
from stocha_hf.training.uncut_prompts import CUT_AT, WITH_DOUBTS, PromptCollator

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS: dict[str, Any] = {"schedule": SILU, "max_steps": 2, "save_steps": 2, "logging_steps": 1, "distill_weight": 1}


def test_a_position_is_in_doubt_where_no_next_token_has_the_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(16, 64, bias=False), 8 * torch.randn(3, 20, 16)
    highest = head(hidden).softmax(-1).amax(-1)
    below = highest.flatten().sort().values[29:31].mean().item()  # between two
    assert torch.equal(in_doubt(hidden, head, below), highest < below)
    monkeypatch.setattr("stocha_hf.training.doubts.chunk_of", lambda vocabulary: 7)
    assert torch.equal(in_doubt(hidden, head, below), highest < below)
    capped = (5 * torch.tanh(head(hidden) / 5)).softmax(-1).amax(-1)
    assert torch.equal(in_doubt(hidden, head, below, softcap=5.0), capped < below)
    words = SomeWords(torch.arange(64), 60, seed=0)  # and the 4 others in each step: no estimate
    assert torch.equal(in_doubt(hidden, head, below, words=words.of_step(0, torch.arange(9))), highest < below)


def test_a_share_of_the_rows_is_told_of_whatever_else_they_draw() -> None:
    rows = list(torch.randint(4, 64, (400, 40), generator=torch.Generator().manual_seed(0)))

    def collated(rows: list[Any]) -> dict[str, Any]:
        return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}

    without, batch = PromptCollator(collated, 0.5, 0, 0.2)(rows), PromptCollator(collated, 0.5, 0, 0.2, 0.3)(rows)
    found = batch[WITH_DOUBTS][:, 0]
    assert (batch[WITH_DOUBTS] == found[:, None]).all()
    assert WITH_DOUBTS not in without and torch.equal(batch[CUT_AT], without[CUT_AT])
    assert found.float().mean().item() == pytest.approx(0.3, abs=0.06)
    for kind in (batch[CUT_AT].any(1), batch[CUT_AT][:, 4]):  # neither those that are cut nor those from the first on
        assert found[kind].float().mean().item() == pytest.approx(0.3, abs=0.09)
    assert torch.equal(PromptCollator(collated, 0.5, 0, 0.2, 0.3)(rows[7:19])[WITH_DOUBTS][:, 0], found[7:19])


def cut_folder(path: Path, fallback: float | None) -> Path:
    model = tiny_model()
    limits = {name: [0.3, 0.4] for name in PROJECTIONS}
    patch(model, StochaConfig(activation="silu", inputs=InputCuts(limits, train=True, fallback=fallback)))
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.mark.slow
def test_a_run_cuts_as_the_fallback_of_its_model_decodes(base: Path, text: Path, tmp_path: Path) -> None:
    def of(fallback: float, **options: Any) -> list[dict[str, float]]:
        folder = cut_folder(tmp_path / f"below{fallback}", fallback)
        learns = {"input_thresholds": "learned", "learning_rate": 0.0, "dtype": "float32", "train_embeddings": False}
        out = tmp_path / f"out{fallback}{options}"
        history = run(folder, text, out, teacher=base, **OPTIONS, **learns, **options)
        if options:
            stage = json.loads((out / "config.json").read_text())["stocha"]["history"][-1]
            assert stage["uncut_doubts"] == options["uncut_doubts"]
        return history

    never, without, half = of(1e-6, uncut_doubts=1.0), of(1e-6), of(0.9999, uncut_doubts=0.5)
    always = of(0.9999, uncut_doubts=1.0)
    assert never[0]["kl"] == without[0]["kl"] > half[0]["kl"] > 0 == pytest.approx(always[0]["kl"], abs=1e-6)
    assert never[0]["lm_loss"] == pytest.approx(always[0]["lm_loss"], rel=0.2)  # of as many tokens
    assert always[0]["inputs_cut"] == pytest.approx(never[0]["inputs_cut"], abs=0.05)  # read before it is repeated


@pytest.mark.slow
def test_doubts_are_the_same_however_a_step_is_computed(base: Path, text: Path, tmp_path: Path) -> None:
    folder = cut_folder(tmp_path / "below", 0.12)  # so an eighth of the teacher's words are in doubt
    shared = {"uncut_doubts": 1.0, "learning_rate": 0.0, "dtype": "float32", "input_thresholds": "learned"}
    variants: list[dict[str, Any]] = [
        {},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"eval_dataset": text, "eval_strategy": "steps", "eval_steps": 1},
    ]
    found = []
    for index, options in enumerate(variants):
        history = run(folder, text, tmp_path / f"out{index}", teacher=base, **OPTIONS, **shared, **options)
        steps = [entry for entry in history if "loss" in entry]
        found.append([(entry["kl"], entry["grad_norm"], entry["inputs_cut"]) for entry in steps])
    for other in found[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(found[0]), rtol=1e-4, atol=1e-6)


def test_doubts_are_refused_where_nothing_repeats_them_or_nobody_tells(base: Path, text: Path, tmp_path: Path) -> None:
    plain, careful = cut_folder(tmp_path / "plain", None), cut_folder(tmp_path / "careful", 0.5)
    cases = [
        (plain, {"teacher": base}, r"uncut_doubts is 0\.5 and the model repeats no steps .*--inputs-fallback"),
        (careful, {"distill_weight": 0.5}, r"uncut_doubts is 0\.5 and there is no teacher"),
        (base, {"teacher": base}, r"uncut_doubts is 0\.5 and .*base computes all inputs in full"),
        (careful, {"teacher": base, "uncut_doubts": 1.5}, r"uncut_doubts is 1\.5: expected a number between 0 and 1"),
    ]
    for folder, options, message in cases:
        with pytest.raises(StochaError, match=message):
            run(folder, text, tmp_path / "none", **OPTIONS | {"uncut_doubts": 0.5} | options)
