"""Perplexity and zeros against their definitions."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import call_command, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from stocha_hf import StochaConfig, patch
from stocha_hf.checkpoints.hashing import weights_hash
from stocha_hf.data import text_windows
from stocha_hf.errors import StochaError
from stocha_hf.measurement import evaluation
from stocha_hf.measurement.evaluation import compare, evaluate
from stocha_hf.measurement.records import Comparison, Evaluation
from stocha_hf.publishing.measured_files import check_record

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOWS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))


def test_perplexity_and_zeros_are_those_of_their_definitions() -> None:
    model = tiny_model()
    patch(model, StochaConfig(activation="relu"))
    windows = torch.randint(64, (7, 20), generator=torch.Generator().manual_seed(0))
    hidden: list[torch.Tensor] = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
        for layer in model.model.layers
    ]
    losses = torch.stack([model(window[None], labels=window[None]).loss for window in windows])
    for hook in hooks:
        hook.remove()
    zeros = torch.stack([(part == 0).double().mean() for part in hidden]).view(7, 2).mean(0)
    found = evaluate(model, windows)
    assert found.perplexity == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert found.tokens == 140
    assert found.sparsity.per_layer == pytest.approx(zeros.tolist())
    assert found.sparsity.mean == pytest.approx(zeros.mean().item())
    assert found.activation == "relu"
    active = torch.cat(hidden[::2]) != 0  # the first layer's, [windows, length, neurons]
    assert found.never_active.per_layer[0] == pytest.approx((~active.any(0).any(0)).double().mean().item())
    again = (active[:, 1:] & active[:, :-1]).sum() / active[:, 1:].sum()
    assert found.reuse.per_layer[0] == pytest.approx(again.item())


def test_aggregated_sparsity_counts_what_the_first_tokens_left_unused() -> None:
    model = tiny_model()
    patch(model, StochaConfig(activation="relu"))
    windows = torch.randint(64, (6, 20), generator=torch.Generator().manual_seed(0))  # a whole batch and a part of one
    hidden: list[torch.Tensor] = []
    down_proj = model.model.layers[1].mlp.down_proj
    hook = down_proj.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    found = evaluate(model, windows)
    hook.remove()
    told, active = found.aggregated_sparsity, torch.cat(hidden) != 0  # [windows, length, neurons]
    assert told.tokens == [1, 2, 4, 8, 16, 20]
    for t, share, mean, independent in zip(told.tokens, told.per_layer[1], told.mean, told.independent, strict=True):
        unused = [sum(not active[w, :t, i].any() for i in range(48)) / 48 for w in range(6)]
        assert share == pytest.approx(sum(unused) / 6)
        assert mean == pytest.approx((told.per_layer[0][told.tokens.index(t)] + share) / 2)
        assert independent == pytest.approx(sum(s**t for s in found.sparsity.per_layer) / 2)


def test_a_neuron_that_cannot_fire_is_never_active() -> None:
    model = tiny_model()
    patch(model, StochaConfig(activation="relu"))
    model.model.layers[1].mlp.up_proj.weight.data[:12] = 0  # of 48
    found = evaluate(model, torch.randint(64, (4, 30)))
    assert found.never_active.per_layer[1] >= 0.25


def test_predictions_are_compared_by_their_definitions() -> None:
    model, baseline = tiny_model(), tiny_model()
    patch(model, StochaConfig(activation="relu"))
    patch(baseline, StochaConfig(activation="silu"))
    windows = torch.randint(64, (6, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (some(windows).logits.double() for some in (model, baseline))
    chances = expected.softmax(-1)
    divergence = (chances * (chances.log() - found.log_softmax(-1))).sum(-1).mean()
    told = compare(model, baseline, windows)
    assert told.kl == pytest.approx(divergence.item(), rel=1e-4) and told.kl > 0.01
    assert told.top1_agreement == (found.argmax(-1) == expected.argmax(-1)).double().mean().item()
    assert compare(model, model, windows) == Comparison(pytest.approx(0, abs=1e-6), 1.0)


def test_with_a_large_vocabulary_fewer_windows_are_read_at_once(monkeypatch) -> None:
    model = tiny_model()
    patch(model, StochaConfig(activation="relu"))
    windows = torch.randint(64, (7, 20), generator=torch.Generator().manual_seed(0))
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    whole = evaluate(model, windows)
    monkeypatch.setattr(evaluation, "LOGITS", 2 * 20 * 64)
    found = evaluate(model, windows)
    assert sizes == [4, 3, 2, 2, 2, 1] and found.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    monkeypatch.setattr(evaluation, "LOGITS", 1)
    assert len([*evaluation.batches(model, windows, "Reading")]) == 7


@pytest.mark.slow
def test_the_command_measures_a_model_beside_another(checkpoint, tmp_path) -> None:
    source, text = checkpoint(), tmp_path / "text.txt"
    text.write_text(" ".join(f"w{4 + i % 60}" for i in range(500)))
    options = ["--data", text, "--length", 32, "--dtype", "float32", "--plot", tmp_path / "zeros.png", "--json"]
    done = call_command("stocha-eval", source, "--mode", "relu", "--baseline", source, *options)
    figures = json.loads(done.stdout)
    assert figures["tokens"] == 480 and len(figures["sparsity"]["per_layer"]) == 2, done.stderr
    assert figures["activation"] == "relu" and figures["sparsity"]["mean"] > 0.3
    assert figures["baseline"]["activation"] == "silu" and figures["baseline"]["sparsity"]["mean"] < 0.01
    assert figures["kl"] > 0 and 0 <= figures["top1_agreement"] <= 1
    assert figures["weights"] == figures["baseline"]["weights"] == weights_hash(source)
    assert "--mode relu" in figures["command"] and figures["length"] == 32 and figures["dtype"] == "float32"
    assert figures["versions"]["torch"] == torch.__version__ and figures["hardware"]
    assert (tmp_path / "zeros.png").read_bytes().startswith(b"\x89PNG")
    done = call_command("stocha-eval", source, "--mode", "topk", "--data", text, "--length", 32, "--dtype", "float32")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("stocha-eval: --mode topk cannot run")


def test_text_windows_hold_the_text_in_order(tmp_path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "w4 w5 w6 w7 w8"}\n{"text": "w9 w10 w11 w12"}\n')
    assert text_windows(str(path), tmp_path, 2).tolist() == [[4, 5], [6, 7], [8, 9], [10, 11]]
    assert text_windows(str(path), tmp_path, 2, most=2).tolist() == [[4, 5], [8, 9]]
    with pytest.raises(StochaError, match="9 tokens: expected at least one window of 10"):
        text_windows(str(path), tmp_path, 10)


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", "$A </s>"])
def test_text_windows_begin_with_the_token_before_a_text(tmp_path, template: str) -> None:
    tokenizer = tiny_tokenizer()
    special = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "w4 w5 w6"}\n{"text": "w7 w8 w9"}\n')
    expected = [[1, 4, 5], [1, 6, 7], [1, 8, 9]] if template.startswith("<s>") else [[4, 5, 6], [7, 8, 9]]
    assert text_windows(str(path), tmp_path, 3).tolist() == expected


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "loss is nan"), (1e30, "no finite perplexity")])
def test_a_loss_without_perplexity_is_refused(value: float, words: str) -> None:
    """NaN is no JSON, and exp of a loss above 709 no number."""
    model = tiny_model()
    patch(model, StochaConfig(activation="relu"))
    model.lm_head.weight.data.mul_(value)
    with pytest.raises(StochaError, match=words):
        evaluate(model, WINDOWS)
    if value != value:
        with pytest.raises(StochaError, match="divergence of the predictions is nan"):
            compare(model, model, WINDOWS)


def test_models_of_other_vocabularies_are_not_compared() -> None:
    model, other = tiny_model(), tiny_model(vocab_size=32)
    for some in (model, other):
        patch(some, StochaConfig(activation="relu"))
    with pytest.raises(StochaError, match="64 and 32 tokens"):
        compare(model, other, WINDOWS)
    with pytest.raises(StochaError, match=r"the token 63, but the model only 32 tokens"):
        evaluate(other, torch.full((1, 8), 63))


def test_the_figures_have_the_keys_that_files_of_measurements_have() -> None:
    model = tiny_model()
    patch(model, StochaConfig(activation="relu"))
    found = evaluate(model, WINDOWS).to_dict()
    shares = {"mean", "per_layer"}
    assert list(found) == [
        "perplexity", "tokens", "activation", "sparsity", "never_active", "reuse", "aggregated_sparsity",
        "bytes_read",
    ]  # fmt: skip
    assert list(found["bytes_read"]) == ["step", "blocks", "lm_head", "dense_blocks", "share"]
    assert all(found[key].keys() == shares for key in ("sparsity", "never_active", "reuse"))
    assert found["aggregated_sparsity"].keys() == {"tokens", "mean", "independent", "per_layer"}
    assert compare(model, model, WINDOWS).to_dict().keys() == {"kl", "top1_agreement"}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    check_record(found, Evaluation, "here")
