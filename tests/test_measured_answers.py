"""A model measured on answers: prompts in full, answers with cuts, as it decodes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_refused, call_command, tiny_model
from transformers import DynamicCache

import stocha_hf
from stocha_hf.cuts import PROJECTIONS
from stocha_hf.errors import StochaError
from stocha_hf.measurement.answers import answer_rows, evaluate_answers
from stocha_hf.modeling_stocha import InputCuts, StochaConfig
from stocha_hf.patching import patch
from stocha_hf.spec import ARCHITECTURES

ROWS = [([7, 8, 5, 9, 13, 21, 40, 41, 11], 4), ([5, 9, 33, 40, 2, 1, 60, 22], 3), ([8, 9, 10], 2)]
ANSWERS = sum(len(ids) - prompt for ids, prompt in ROWS)
pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(fallback: float | None = None, cut: bool = True, model_type: str = "qwen2") -> Any:
    torch.manual_seed(0)
    model = tiny_model(model_type)
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)  # some steps are in doubt, and some are not
    cuts = InputCuts({name: [0.5, 0.5] for name in PROJECTIONS}, fallback=fallback) if cut else None
    patch(model, StochaConfig(activation=ARCHITECTURES[model_type].act, inputs=cuts))
    return model.eval()


@torch.no_grad()
def by_steps(model: Any) -> tuple[torch.Tensor, list[int]]:
    """Log-probabilities of all answers' tokens, [tokens, vocabulary], by decoding; and the tokens."""
    found, tokens = [], []
    for ids, prompt in ROWS:
        cache = DynamicCache()
        logits = model(torch.tensor([ids[:prompt]]), past_key_values=cache).logits[:, -1]
        for token in ids[prompt:]:
            found.append(logits[0].log_softmax(-1))
            tokens.append(token)
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits[:, -1]
    return torch.stack(found), tokens


def test_answers_are_predicted_as_steps_predict_them() -> None:
    model, whole = model_of(), model_of(cut=False)
    logs, tokens = by_steps(model)
    aims, _ = by_steps(whole)
    found = evaluate_answers(model, ROWS, whole)
    loss = -logs[range(len(tokens)), tokens].mean().item()
    assert (found.rows, found.tokens) == (len(ROWS), ANSWERS)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.kl == pytest.approx((aims.exp() * (aims - logs)).sum(-1).mean().item(), rel=1e-3)
    assert found.kl > 0.01  # the cuts do something
    assert found.top1_agreement == (aims.argmax(-1) == logs.argmax(-1)).double().mean().item()
    assert 0.3 < found.bytes_read.share < 0.9 and found.fallback is None


def test_where_every_step_is_in_doubt_nothing_is_cut() -> None:
    found = evaluate_answers(model_of(fallback=0.9999), ROWS, model_of(cut=False))
    assert found.kl == pytest.approx(0, abs=1e-6) and found.top1_agreement == 1
    assert (found.fallback.steps, found.fallback.repeated) == (ANSWERS - len(ROWS),) * 2
    assert found.bytes_read.share == pytest.approx(1 + found.fallback.cut_share, rel=1e-4)


def test_some_steps_in_doubt_bring_a_model_nearer() -> None:
    whole = model_of(cut=False)
    cut, some = (evaluate_answers(model_of(fallback=below), ROWS, whole) for below in (None, 0.3))
    assert 0 < some.fallback.repeated < some.fallback.steps
    assert some.kl < cut.kl and some.bytes_read.share > cut.bytes_read.share


@pytest.fixture
def folder(checkpoint: Any, tmp_path: Path) -> Path:
    stocha_hf.convert(str(checkpoint(name="model")), tmp_path / "out", activation="relu")
    rows = [{"prompt": f"w{i} w5 w6", "completion": " w7 w8 w9 w10"} for i in range(10, 16)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_rows_end_at_their_longest_and_are_taken_evenly(folder: Path) -> None:
    data = str(folder / "answers.jsonl")
    rows = answer_rows(data, folder / "out", longest=5, most=3)
    assert [ids[0] for ids, _ in rows] == [10, 12, 14]
    assert all((len(ids), prompt) == (5, 3) for ids, prompt in rows)
    with pytest.raises(StochaError, match="no prompt that leaves room for its answer within 3 tokens"):
        answer_rows(data, folder / "out", longest=3)


def test_the_command_says_what_answers_are_worth(folder: Path) -> None:
    options = ("--answers", folder / "answers.jsonl", "--baseline", folder / "model", "--dtype", "float32")
    figures = json.loads(call_command("stocha-eval", folder / "out", *options, "--json").stdout)
    assert figures["answers"]["rows"] == 6 and figures["answers"]["tokens"] == 24
    assert figures["answers"]["kl"] > 0
    alone = call_command("stocha-eval", folder / "model", *options[:2], *options[4:], "--json")
    expected = json.loads(alone.stdout)["answers"]
    assert figures["answers"]["baseline_perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert expected["kl"] is expected["baseline_perplexity"] is None
    printed = call_command("stocha-eval", folder / "out", *options).stdout
    assert "24 tokens of 6 answers" in printed and "from the second to the first: KL" in printed
    (folder / "text.jsonl").write_text('{"text": "w5 w6 w7"}\n')
    done = call_command("stocha-eval", folder / "out", "--answers", folder / "text.jsonl")
    assert_refused(done, "text.jsonl has no prompts with answers", "prompt and completion")
