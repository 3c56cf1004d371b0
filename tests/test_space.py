"""The Space's page: what it counts and draws, and the page itself in a headless browser."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer

import stocha_hf
from stocha_hf.modeling_stocha import StochaMLP
from stocha_hf.publishing.space.app import Demo, active_shares, heat_map, page, without_kernels


@pytest.fixture
def demo(tmp_path: Path) -> Demo:
    tiny_model().save_pretrained(tmp_path / "native")
    tiny_tokenizer().save_pretrained(tmp_path / "native")
    stocha_hf.convert(tmp_path / "native", tmp_path / "relu", activation="relu")
    return Demo(str(tmp_path / "relu"))


def test_shares_are_those_of_active_neurons(demo):
    ids = torch.tensor([[1, 5, 9, 17, 28]])
    shares = active_shares(demo.model, ids)
    assert shares.shape == (2, 5) and 0.2 < shares.mean() < 0.8
    one = active_shares(demo.model, ids[:, :3])
    torch.testing.assert_close(shares[:, :3], one)  # a token's neurons do not depend on what follows
    with stocha_hf.stocha_mode(demo.model, "silu"):
        assert (active_shares(demo.model, ids) == 1).all()


def test_a_heat_map_has_a_cell_for_each_token_and_layer_and_escapes_tokens():
    shares = torch.tensor([[0.0, 0.5], [0.25, 1.0], [0.1, 0.1]])
    drawn = heat_map(["<b>", " x"], shares)
    assert drawn.count("<td") == 6 and "&lt;b&gt;" in drawn and "<b>" not in drawn
    assert drawn.index(", layer 2: 10%") < drawn.index(", layer 0: 0%")  # the last layer on top
    assert "33% of the neurons are active" in drawn


def test_the_text_is_written_with_and_without_kernels_in_the_chosen_activation(demo):
    runtime = StochaMLP.runtime
    pages = list(demo.write("w9 w17 w30", "relu", 6))
    text, speed, plain, slow, drawn = pages[-1]
    assert text and text == plain and speed.endswith("tokens/s") and slow.endswith("tokens/s")
    assert drawn.count('class="token"') == len(demo.tokenizer(text, add_special_tokens=False).input_ids)
    lengths = [len(one[0]) + len(one[2]) for one in pages]
    assert lengths == sorted(lengths) and len(set(lengths)) > 4, "written piece by piece"
    assert "100% of the neurons" in list(demo.write("w9 w17 w30", "silu", 2))[-1][-1]
    with without_kernels():
        assert StochaMLP.runtime is None
    assert StochaMLP.runtime is runtime and demo.modes[0] == "relu" and "topk" not in demo.modes


@pytest.mark.slow
def test_the_page_in_a_browser(demo, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    pytest.importorskip("gradio")
    chromium = shutil.which("chromium") or pytest.skip("chromium is not installed")
    blocks = page(demo)
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        with playwright.sync_playwright() as started:
            browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            tab = browser.new_page()
            tab.goto(url)
            tab.get_by_label("Prompt").fill("w9 w17 w30")
            tab.get_by_role("button", name="Write").click()
            tab.wait_for_selector("table.neurons td", timeout=30_000)
            assert tab.locator("table.neurons tr").count() == 3  # two layers and the tokens
            assert "tokens/s" in tab.locator("#sparse-speed textarea").input_value()
            browser.close()
    finally:
        blocks.close()
