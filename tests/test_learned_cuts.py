"""Thresholds for each input, learned, and folded into weights that compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from transformers import AutoModelForCausalLM

from stocha_hf.conversion.convert import convert
from stocha_hf.conversion.learned_cuts import _dtype
from stocha_hf.cuts import SHARED
from stocha_hf.cuts_stocha import cut_inputs
from stocha_hf.data import calibration_texts
from stocha_hf.errors import StochaError
from stocha_hf.measurement.blocks import blocks
from stocha_hf.measurement.evaluation import compare, evaluate
from stocha_hf.measurement.selection.input_cuts import calibrate_inputs
from stocha_hf.measurement.selection.input_scales import inputs_of, scale_inputs
from stocha_hf.measurement.selection.learned import FIRST, answers, learn_input_cuts
from stocha_hf.measurement.selection.threshold_gradients import WIDTH, _Cut
from stocha_hf.modeling_stocha import StochaConfig
from stocha_hf.models import load_model
from stocha_hf.patching import patch
from stocha_hf.spec import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOWS = torch.randint(3, 64, (8, 48), generator=torch.Generator().manual_seed(0))


def written(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_scaled_inputs_leave_the_model_as_it_was(model_type: str) -> None:
    model: Any = tiny_model(model_type)
    before = model(WINDOWS[:2]).logits
    seen = {}
    for block in blocks(model):
        for names in SHARED:
            factors = torch.rand(inputs_of(block, names)) + 0.5
            weight = block.linears[names[-1]].weight.detach().clone()
            scale_inputs(block, names, factors)
            seen[names] = (weight - block.linears[names[-1]].weight).abs().max()
    assert all(change > 1e-3 for change in seen.values())
    torch.testing.assert_close(model(WINDOWS[:2]).logits, before, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_learned_is_refused_before_a_weight_changes() -> None:
    model = tiny_model().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for windows, share, words in (
        (WINDOWS, 1.0, "is 1.0: expected a share between 0 and 1"),
        (WINDOWS[:0], 0.5, "there are no windows"),
        (WINDOWS + 10_000, 0.5, "has the token"),
        (WINDOWS.float(), 0.5, "expected token ids, int64"),
        (WINDOWS[0], 0.5, "expected token ids, int64"),
    ):
        with pytest.raises(StochaError, match=words):
            learn_input_cuts(model, windows, share)
    every = torch.ones_like(WINDOWS).bool()
    for options, words in (
        ({"cut_at": every.int()}, "expected bool of the windows' shape"),
        ({"cut_at": every[1:]}, "expected bool of the windows' shape"),
        ({"cut_at": every & (torch.arange(8) > 0)[:, None]}, "a window without a token that is cut"),
        ({"batch": 0}, "the batch is 0"),
    ):
        with pytest.raises(StochaError, match=words):
            learn_input_cuts(model, WINDOWS, 0.5, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    patch(model, StochaConfig(activation="silu", inputs=calibrate_inputs(model, WINDOWS, 0.5)))
    with pytest.raises(StochaError, match="cuts its inputs already"):
        learn_input_cuts(model, WINDOWS, 0.5)


def test_learned_thresholds_read_what_was_asked_for_and_predict_better_than_one_share_for_all(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original, learned, uniform = tiny_model(), tiny_model(), tiny_model()
    cuts = learn_input_cuts(learned.eval(), WINDOWS, 0.5, steps=20)
    torch.testing.assert_close(learned(WINDOWS[:2]).logits, original.eval()(WINDOWS[:2]).logits, rtol=1e-4, atol=1e-4)
    assert all(parameter.requires_grad for parameter in learned.parameters())
    patch(learned, StochaConfig(activation="silu", inputs=cuts))
    patch(uniform, StochaConfig(activation="silu", inputs=calibrate_inputs(uniform.eval(), WINDOWS, 0.5)))
    found = {}
    for name, model in (("learned", learned), ("uniform", uniform)):
        with cut_inputs(model, "always"):
            found[name] = evaluate(model.eval(), WINDOWS).bytes_read.share, compare(model, original, WINDOWS).kl
    assert found["learned"][0] == pytest.approx(found["uniform"][0], abs=0.02)
    assert found["learned"][1] < 0.9 * found["uniform"][1]
    learned.save_pretrained(tmp_path)  # natively it is the original
    native = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(native(WINDOWS[:2]).logits, original(WINDOWS[:2]).logits, rtol=1e-4, atol=1e-4)


def test_rows_are_whole_texts_that_are_cut_behind_a_random_beginning(checkpoint: Any, tmp_path: Path) -> None:
    texts = [" ".join(["w9", *["w10"] * (n - 2)]) for n in (8, 17, 20, 100)]
    data = written(tmp_path / "some.jsonl", texts)
    rows, lengths, _ = calibration_texts(str(data), checkpoint(), 10, 32, 0)
    start = [] if (first := rows[0, 0].item()) == 9 else [first]
    assert sorted(lengths.tolist()) == [16 + len(start), 19 + len(start), 32]
    for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
        assert row[: len(start) + 2] == [*start, 9, 10] and 0 not in row[:length]
        assert row[length:] == [0] * (32 - length)
    lengths = torch.tensor([16, 40, 64] * 100)
    cut = answers(lengths, 64)
    begins, ends = cut.int().argmax(1), cut.sum(1) + cut.int().argmax(1)
    assert torch.equal(ends, lengths) and int(begins.min()) == FIRST
    assert len(begins.unique()) > 20 and (begins <= 0.75 * lengths).all()


def test_a_row_with_a_prompt_is_cut_behind_it_and_one_of_text_behind_a_random_beginning(
    checkpoint: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [
        (5, 20),
        (30, 3),
        (17, 17),
        (10, 400),
        (2, 40),
        (63, 9),
        (70, 9),
        (4, 8),
    ]  # of 64 tokens; the last is short
    lines = [{"prompt": " ".join(["w9"] * p), "completion": " ".join(["w10"] * c), "finished": True} for p, c in sizes]
    data = tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def learn(model: Any, rows: torch.Tensor, share: float, *, cut_at: torch.Tensor, **fields: Any) -> None:
        seen.append((rows, cut_at))
        raise StochaError("seen")

    monkeypatch.setattr("stocha_hf.conversion.learned_cuts.learn_input_cuts", learn)
    monkeypatch.setattr("stocha_hf.conversion.learned_cuts.BATCH", 6)
    source = checkpoint()
    for calibrate in (data, text):
        with pytest.raises(StochaError, match="seen"):
            convert(source, tmp_path / "cut", inputs=0.5, inputs_allotment="learned", calibrate=calibrate)
    (rows, cut), (_, of_text) = seen
    found = {(int((row == 9).sum()), int((row == 10).sum())): at for row, at in zip(rows, cut, strict=True)}
    assert set(found) == {(5, 20), (30, 3), (17, 17), (10, 54), (2, 40), (63, 1)}
    start = int(rows[0, 0] != 9)
    for (prompt, answer), at in found.items():
        if prompt > FIRST:
            assert at.nonzero()[:, 0].tolist() == list(range(start + prompt, start + prompt + answer))
    assert found[2, 40].int().argmax() >= FIRST and found[2, 40].sum() >= 10
    assert len(of_text.int().argmax(1).unique()) > 10


def test_autograd_of_the_cut_is_that_of_its_sigmoid() -> None:
    torch.manual_seed(0)
    x, limits = torch.randn(2, 5, 3), torch.randn(3, requires_grad=True)
    x[0, 3, 1] = 0
    x.requires_grad_()
    at, weights = torch.rand(2, 5) > 0.3, torch.randn(2, 5, 3)
    soft = torch.sigmoid((x.abs().clamp(min=1e-12).log() - limits) / WIDTH)
    keep = torch.where(at[..., None], (soft > 0.5).float() + soft - soft.detach(), 1.0)
    found = []
    for cut, kept in (
        _Cut.apply(x, limits, at),
        (x * keep, (keep * at[..., None]).sum() / (3 * at.sum())),
    ):
        found.append((cut, kept, *torch.autograd.grad((cut * weights).sum() + 5 * kept, (x, limits))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_convert_folds_learned_thresholds_into_the_folder_and_says_so(
    checkpoint: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn_input_cuts, "__kwdefaults__", learn_input_cuts.__kwdefaults__ | {"steps": 3})
    source, out = checkpoint(dtype=torch.bfloat16), tmp_path / "cut"
    done = convert(source, out, inputs=0.5, inputs_allotment="learned", calibrate=text, inputs_train=True)
    entry = done.stocha
    assert entry["inputs"]["share"] == 0.5 and entry["inputs"]["train"] and entry["inference"] == "silu"
    assert {len(values) for values in entry["inputs"]["thresholds"].values()} == {2}
    (stage,) = entry["history"]
    assert stage["method"] == "learned_inputs" and stage["data"] == "text.jsonl" and stage["share"] == 0.5
    card = " ".join((out / "README.md").read_text().split())
    assert "were scaled. Without cuts the model computes what the source does, up to rounding" in card
    assert "Thresholds for each input were learned on text.jsonl; scales in the weights let one" in card
    assert "leaves every weight" not in card and "method: learned_inputs" in card
    native, original = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (out, source))
    assert not torch.equal(native.model.layers[1].mlp.down_proj.weight, original.model.layers[1].mlp.down_proj.weight)
    assert compare(native, original, WINDOWS).kl < 1e-3
    cut = load_model(str(out), dtype=torch.float32)
    with cut_inputs(cut, "always"):
        assert evaluate(cut, WINDOWS).bytes_read.share < 0.8  # type: ignore[union-attr]


def test_weights_are_scaled_in_the_dtype_that_the_files_have_whatever_the_config_says(checkpoint: Any) -> None:
    for stored, expected in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        folder = checkpoint(dtype=stored)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
        assert _dtype(folder, on_gpu=True) == expected and _dtype(folder, on_gpu=False) == "float32"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"inputs_of": ["q_proj"]}, "inputs_of q_proj was given with inputs_allotment learned"),
        ({"bits": 4}, "bits 4 was given with inputs_allotment learned"),
        ({"refit": "text.jsonl"}, "was given with refit"),
        ({"inputs": 0}, "takes cuts off"),
        ({"activation": "relu"}, "makes the FFN sparse: expected silu"),
        ({"calibrate_tokens": 64 * 1000, "calibrate": "few.jsonl"}, "has 2 texts that are long enough to learn"),
    ],
)
def test_what_learning_does_not_go_with_is_refused_in_a_sentence(
    given: dict[str, Any], words: str, checkpoint: Any, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text.parent)
    written(Path("few.jsonl"), [" ".join(["w9"] * 20)] * 2)
    options = {"inputs": 0.5, "inputs_allotment": "learned", "calibrate": text.name} | given
    with pytest.raises(StochaError, match=words):
        convert(checkpoint(), "out", **options)
    assert not Path("out").exists()
