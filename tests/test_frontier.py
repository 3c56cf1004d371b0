"""benchmarks/frontier.py: rows that a second run does not measure again, and a picture of them; acceptance."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import tiny_model

from stocha_hf.measurement.acceptance import acceptance, greedy_text
from stocha_hf.measurement.selection.calibration import Calibration
from stocha_hf.measurement.selection.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(__file__).parent.parent / "benchmarks" / "frontier.py"


@pytest.fixture(scope="module")
def frontier() -> ModuleType:
    spec = importlib.util.spec_from_file_location("frontier", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["frontier"] = module  # where dataclasses looks for its types
    spec.loader.exec_module(module)
    return module


def run(frontier: ModuleType, monkeypatch: Any, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["frontier.py", *map(str, arguments)])
    frontier.main()


@pytest.mark.slow
def test_a_second_run_adds_what_is_missing(frontier, monkeypatch, checkpoint, text, tmp_path) -> None:
    out, picture = tmp_path / "out.jsonl", tmp_path / "out.png"
    options = ["--calibrate", text, "--eval", text, "--json", out, "--length", 32, "--windows", 4, "--tokens", 256]
    options += ["--prompt-tokens", 8, "--new-tokens", 4, "--most-prompts", 2, "--dtype", "float32"]
    scored: list[Any] = []

    def scorer(args: Any, tokenizer: Any) -> Any:
        return lambda model, one_by_one: (
            scored.append(model) or [{"task": "quiz", "metric": "acc", "score": 0.5, "stderr": 0.1}]
        )

    monkeypatch.setattr(frontier, "scorer", scorer)
    source = checkpoint()
    run(frontier, monkeypatch, source, *options, "--methods", "teal", "cats", "--shares", 0.5)
    with out.open("a") as file:
        file.write('{"method": "teal", "sha')  # a run that was killed
    run(frontier, monkeypatch, source, *options, "--methods", "teal", "--shares", 0.5, 0.7, "--plot", picture)
    rows = frontier.read_rows(out)
    points = [(row["method"], row["share"]) for row in rows]
    assert points == [("original", 0.0), ("teal", 0.5), ("cats", 0.5), ("teal", 0.7)]
    assert len(scored) == 4
    original, teal, cats, _ = rows
    assert original["acceptance"] == 1.0 and original["bytes_read"]["share"] == pytest.approx(1, abs=0.01)
    assert teal["bytes_read"]["share"] == pytest.approx(0.5, abs=0.05)
    assert 0.75 < cats["bytes_read"]["share"] < 0.85
    assert list(teal["perplexity"]) == ["text"] and teal["perplexity"]["text"] != original["perplexity"]["text"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(out.read_text().splitlines()[0])["settings"]["length"] == 32


def test_the_picture_shows_what_can_be_compared(frontier, monkeypatch, tmp_path) -> None:
    """No oracles, one point a share, and an axis that a broken method does not stretch."""

    def row(method: str, share: float, perplexity: float, **more: Any) -> dict[str, Any]:
        return {
            "method": method,
            "share": share,
            "perplexity": {"docs": perplexity},
            "bytes_read": {"step": 1e6},
        } | more

    rows = [row("original", 0.0, 10.0), row("teal", 0.5, 12.0), row("reuse", 0.5, 1e5), row("teal", 0.5, 12.0)]
    drawn: list[Any] = []
    monkeypatch.setattr(frontier, "plot", lambda target, pictures: drawn.extend(pictures))
    frontier.draw([*rows, row("attribution", 0.5, 2.0, oracle=True)], tmp_path / "out.png")
    (picture,) = drawn
    assert {label: len(points) for label, points in picture.lines.items()} == {"original": 1, "teal": 1, "reuse": 1}
    low, high = picture.y_limits
    assert 9 < low < 10 and high == frontier.HIGHEST * 10


def test_acceptance_judges_what_decode_steps_would_write() -> None:
    """Against generation itself: a cut model that is given the original's text, a token at a time."""
    model = tiny_model()
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    text = greedy_text(model, prompts, new_tokens=10)
    assert text.tokens[1, :2].tolist() == [0, 0] and text.mask[:, 4:].any(1).all()
    assert acceptance(model, text) == 1.0
    windows = torch.randint(3, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    selection = METHODS["teal"].select(Calibration(model, windows), 0.6)
    with selection.applied(model, prompt=text.prompt):
        found = acceptance(model, text)
    same = 0
    with selection.applied(model, decoding=True), torch.no_grad():
        for ids, mask in zip(text.tokens, text.mask, strict=True):
            ids, prompt = ids[mask.bool()], int(mask[: text.prompt].sum())
            cache = model(ids[None, :prompt], use_cache=True).past_key_values
            for at in range(prompt, len(ids) - 1):
                logits = model(ids[None, at : at + 1], past_key_values=cache).logits
                same += int(logits[0, -1].argmax() == ids[at + 1])
    assert found == pytest.approx(same / text.judged) and 0 < found < 1
