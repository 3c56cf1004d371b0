"""Refit: the closed form against a reference, the local fit, running layer by layer, whole conversions, kills."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONFIGS, assert_refused, call_command, first_is_fast, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stocha_hf import StochaConfig, patch
from stocha_hf.checkpoints.inspection import read_config
from stocha_hf.checkpoints.tensors import Tensors
from stocha_hf.conversion import refit, refit_store, refit_streams
from stocha_hf.conversion.convert import convert
from stocha_hf.conversion.layerwise import Layers, autocast
from stocha_hf.conversion.refit_ffn import FFN, RIDGES, Fitted, Rows, balance, refit_ffn, solve_down, threshold_for
from stocha_hf.conversion.refit_model import refit as refit_model
from stocha_hf.conversion.refit_shares import allocate
from stocha_hf.data import calibration_windows
from stocha_hf.data import rows as data_rows
from stocha_hf.errors import StochaError
from stocha_hf.measurement.sparsity import SparsityMeter
from stocha_hf.models import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.randint(4, 64, (8, 64), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    words = torch.randint(4, 64, (60, 60), generator=torch.Generator().manual_seed(1)).tolist()
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(f"w{word}" for word in row)}) + "\n" for row in words))
    return path


def silu_ffn(hidden: int = 16, width: int = 40) -> tuple[FFN, Any]:
    """A random FFN and the function that it computes with SiLU."""
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(width, hidden, generator=generator) / hidden**0.5 for _ in range(2))
    down = torch.randn(hidden, width, generator=generator) / width**0.5
    return FFN(gate, up, down), lambda x: (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def silu_rows(count: int = 8192) -> tuple[FFN, Rows]:
    ffn, function = silu_ffn()
    inputs = torch.randn(count, 16, generator=torch.Generator().manual_seed(1))
    return ffn, Rows(inputs, function(inputs), torch.rand(count, generator=torch.Generator().manual_seed(2)) + 0.5)


def relative_error(ffn: FFN, rows: Rows) -> float:
    squares = ((ffn(rows.inputs) - rows.targets).square().sum(1) * rows.weights).sum()
    return (squares / (rows.targets.square().sum(1) * rows.weights).sum()).item()


def test_closed_form_equals_weighted_least_squares() -> None:
    ffn, rows = silu_rows()
    done = solve_down(ffn, rows, rows[:1000])
    solved, error = done.ffn, done.error
    hidden = ffn.hidden(rows.inputs).double() * rows.weights.double().sqrt().unsqueeze(1)
    reference = torch.linalg.lstsq(hidden, rows.targets.double() * rows.weights.double().sqrt().unsqueeze(1)).solution
    difference = (solved.down.double() - reference.T).norm() / reference.norm()
    assert difference < 0.02  # products in bfloat16, and the least ridge
    assert error == pytest.approx(relative_error(solved, rows[:1000]), rel=0.05)
    assert relative_error(solved, rows) < relative_error(ffn, rows)


def test_balance_keeps_the_relu_function_and_evens_contributions() -> None:
    ffn, rows = silu_rows()
    uneven = FFN(ffn.gate, ffn.up * torch.logspace(-1, 1, 40).unsqueeze(1), ffn.down)
    even = balance(uneven, rows.inputs)
    torch.testing.assert_close(even(rows.inputs), uneven(rows.inputs), rtol=1e-4, atol=1e-4)
    factor = (rows.inputs @ even.up.T).square().mean(0).sqrt() * even.down.norm(dim=0)
    assert factor.max() / factor.min() < 1.01


@pytest.mark.slow
def test_each_part_of_the_fit_lowers_the_error_on_rows_it_has_not_seen() -> None:
    ffn, rows = silu_rows(16384)
    seen, unseen = rows[:12288], rows[12288:]
    swapped = relative_error(ffn, unseen)
    closed = relative_error(solve_down(ffn, seen, unseen).ffn, unseen)
    done = refit_ffn(ffn, seen, steps=100)
    fitted, told = done.ffn, done.error
    assert relative_error(fitted, unseen) < 0.7 * closed < 0.7 * swapped
    assert told == pytest.approx(relative_error(fitted, unseen), rel=0.1)


@pytest.mark.parametrize("share", first_is_fast([0.7, 0.9]))
def test_a_share_of_zeros_is_met_by_a_threshold(share: float) -> None:
    ffn, rows = silu_rows()
    done = refit_ffn(ffn, rows, share=share, steps=50)
    fitted = done.ffn
    assert fitted.threshold > 0
    assert (fitted.hidden(rows.inputs) == 0).double().mean().item() == pytest.approx(share, abs=0.02)
    assert done.zeros == pytest.approx(share, abs=0.02)
    assert threshold_for(ffn, rows, 0.1) == 0.0  # plain ReLU makes more
    assert relative_error(fitted, rows) < relative_error(FFN(ffn.gate, ffn.up, ffn.down, fitted.threshold), rows)


def test_a_seed_gives_the_same_weights() -> None:
    ffn, rows = silu_rows()
    first, second, other = (refit_ffn(ffn, rows, steps=5, seed=seed).ffn.gate for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_hidden_vectors_of_zeros_only_are_refused() -> None:
    ffn, rows = silu_rows(512)
    with pytest.raises(StochaError, match=f"singular for every ridge up to {RIDGES[-1]}"):
        solve_down(FFN(ffn.gate, ffn.up, ffn.down, threshold=1e9), rows, rows)


@pytest.mark.parametrize("model_type", first_is_fast(CONFIGS))
def test_layer_by_layer_computes_what_the_model_computes(checkpoint, model_type: str) -> None:
    folder = checkpoint(model_type, num_hidden_layers=3)
    layers = Layers(Tensors(folder), read_config(folder), "cpu")
    hidden = layers.embed(TOKENS)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad(), autocast("cpu"):
        states: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, args, output: states.append(output.float()))
        model(TOKENS)
        for index in range(len(layers)):
            with layers.load(index) as layer:
                stream, inputs = layers.attention(layer, index, hidden)
                hidden = (stream + layers.after_ffn(layer, layer.mlp(inputs))).float()
            torch.testing.assert_close(hidden, states[index], rtol=0.05, atol=0.05 * states[index].std().item())
            assert all(parameter.is_meta for parameter in layers.model.layers.parameters())


@pytest.mark.parametrize("model_type", first_is_fast(CONFIGS))
def test_conversion_with_refit_comes_nearer_to_the_source(
    checkpoint, text, tmp_path, monkeypatch, model_type: str
) -> None:
    source = checkpoint(model_type, max_shard_size="20KB")
    # a folder of model_type qwen2 is given Qwen2's tokenizer, which knows none of the words
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda folder, **kwargs: tiny_tokenizer())
    convert(source, tmp_path / "swapped", activation="relu")
    done = convert(source, tmp_path / "out", refit=str(text), refit_tokens=512)
    assert done.stocha["activation"] == done.stocha["inference"] == "relu"
    assert done.stocha["history"][0]["method"] == "refit" and done.stocha["history"][0]["tokens"] == 512
    logits = {
        name: AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits.log_softmax(-1)
        for name, folder in {"source": source, "swapped": tmp_path / "swapped", "out": tmp_path / "out"}.items()
    }
    kl = {
        name: torch.nn.functional.kl_div(logits[name], logits["source"], log_target=True, reduction="batchmean")
        for name in ("swapped", "out")
    }
    assert kl["out"] < 0.8 * kl["swapped"]
    custom = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)(TOKENS).logits
    assert torch.equal(custom.log_softmax(-1), logits["out"])
    before, after = (all_tensors(folder) for folder in (source, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".mlp." in name} and before.keys() == after.keys()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_target_sparsity_is_met_with_thresholds_in_the_config(checkpoint, text, tmp_path) -> None:
    given = ("--refit", text, "--refit-tokens", 2048, "--target-sparsity", 0.85)
    done = call_command("stocha-convert", checkpoint(), tmp_path / "out", *given)
    stocha = read_config(tmp_path / "out")["stocha"]
    assert stocha["activation"] == stocha["inference"] == "fatrelu"
    assert len(stocha["threshold"]) == 2
    assert "refitted layer by layer on 2,048 tokens" in (tmp_path / "out" / "README.md").read_text()
    model = load_model(str(tmp_path / "out")).eval()
    meter = SparsityMeter(model)
    with meter.record(), torch.no_grad():
        model(TOKENS)
    assert meter.read()["mean"] == pytest.approx(0.85, abs=0.04)
    assert stocha["history"][0]["zeros"] == pytest.approx(0.85, abs=0.04)
    assert f"{stocha['history'][0]['zeros']:.1%} zeros" in done.stdout.splitlines()[-1], done


def test_shares_follow_what_zeros_cost(checkpoint) -> None:
    """A layer that adds little to the stream is given more of the zeros."""
    folder = checkpoint(num_hidden_layers=3)
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"] /= 20
    save_file(weights, path, {"format": "pt"})
    layers = Layers(Tensors(folder), read_config(folder), "cpu")
    shares = allocate(layers, TOKENS, 0.8)
    assert sum(shares) / 3 == pytest.approx(0.8, abs=0.01)
    assert shares[1] > max(shares[0], shares[2]) + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 60])
def test_killed_it_goes_on_and_ends_with_the_same_weights(checkpoint, text, tmp_path, monkeypatch, seconds) -> None:
    """With its streams kept every so many seconds, the layers before are not computed again."""
    monkeypatch.setattr(refit, "KEEP_EVERY", seconds)
    passed: list[int] = []
    through = refit_streams.Streams.through_attention
    monkeypatch.setattr(
        refit_streams.Streams, "through_attention", lambda *args: (passed.append(args[2]), through(*args))[1]
    )
    source = checkpoint(num_hidden_layers=3)
    options: dict[str, Any] = {"refit": str(text), "refit_tokens": 512, "target_sparsity": 0.8}
    convert(source, tmp_path / "whole", **options)
    fits: list[int] = []

    def fit_two(*args: Any, **kwargs: Any) -> Any:
        fits.append(kwargs["seed"])
        if len(fits) == 3:
            raise KeyboardInterrupt
        return refit_ffn(*args, **kwargs)

    monkeypatch.setattr(refit, "refit_ffn", fit_two)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.refit").is_dir()
    convert(source, tmp_path / "out", **options)
    assert fits == [0, 1, 2, 2]
    assert passed[6:] == ([2] if seconds == 0 else [0, 1, 2])
    whole, resumed = (all_tensors(tmp_path / name) for name in ("whole", "out"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert read_config(tmp_path / "whole")["stocha"] == read_config(tmp_path / "out")["stocha"]


def test_finished_layers_of_other_options_are_not_used(checkpoint, text, tmp_path, monkeypatch) -> None:
    source, fits = checkpoint(), []

    def fit(*args: Any, **kwargs: Any) -> Any:
        if len(fits) == 1:
            fits.append(0)
            raise KeyboardInterrupt
        fits.append(kwargs["share"])
        return refit_ffn(*args, **kwargs)

    monkeypatch.setattr(refit, "refit_ffn", fit)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", refit=str(text), refit_tokens=512)
    convert(source, tmp_path / "out", refit=str(text), refit_tokens=512, target_sparsity=0.8)
    assert len(fits) == 4 and fits[0] is None and min(fits[2:]) > 0.5


def test_streams_on_disk_give_the_same_weights(checkpoint, text, tmp_path) -> None:
    source = checkpoint()
    for name, on_disk in (("memory", False), ("disk", True)):
        convert(source, tmp_path / name, refit=str(text), refit_tokens=512, refit_on_disk=on_disk)
    memory, disk = (all_tensors(tmp_path / name) for name in ("memory", "disk"))
    assert all(torch.equal(memory[name], disk[name]) for name in memory)


def test_a_full_disk_is_told_in_one_sentence_and_keeps_finished_layers(
    checkpoint, text, tmp_path, monkeypatch
) -> None:
    source, store = checkpoint(), refit_store.save_file

    def full_at_the_second(tensors: Any, path: Path, metadata: Any) -> None:
        if "001" in path.name:
            raise OSError(28, "No space left on device")
        store(tensors, path, metadata)

    monkeypatch.setattr(refit_store, "save_file", full_at_the_second)
    with pytest.raises(StochaError, match=r"No space left on device.*continues from the finished layers"):
        convert(source, tmp_path / "out", refit=str(text), refit_tokens=512)
    assert [path.name for path in (tmp_path / ".out.refit").glob("*/layer*")] == ["layer-000.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "without layer 0"])
def test_kept_streams_that_are_of_no_use_are_removed(checkpoint, tmp_path, damage: str) -> None:
    """They only save time: the refit then begins at its first layer, with the streams that stand there."""
    layers = Layers(Tensors(folder := checkpoint()), read_config(folder), "cpu")
    kept, finished = tmp_path / refit_streams.KEPT, 1
    streams, begun = (refit_streams.Streams(layers, TOKENS, None) for _ in range(2))
    streams.original += 1
    streams.keep(kept, 1, [0.5, 0.7])
    assert begun.resume(kept, finished) == ([0.5, 0.7], 1) and torch.equal(begun.original, streams.original)
    begun, first = (refit_streams.Streams(layers, TOKENS, None) for _ in range(2))
    if damage == "without layer 0":
        finished = 0
    else:
        kept.write_bytes(kept.read_bytes()[:2000] if damage == "truncated" else b"")
    assert begun.resume(kept, finished) is None and not kept.exists()
    assert torch.equal(begun.original, first.original)


def test_kept_streams_make_room_for_a_finished_layer(tmp_path, monkeypatch) -> None:
    store, kept, save = refit_store.LayerFiles(tmp_path), tmp_path / refit_streams.KEPT, refit_store.save_file

    def full(*args: Any) -> None:
        if kept.exists():
            raise OSError(28, "No space left on device")
        save(*args)

    monkeypatch.setattr(refit_store, "save_file", full)
    kept.write_bytes(b"streams")
    store[0] = Fitted(silu_ffn()[0], 0.25, 0.8)
    assert 0 in store and (store[0].error, store[0].zeros) == (0.25, 0.8) and not kept.exists()


@pytest.mark.parametrize("damage", ["truncated", "without figures"])
def test_a_damaged_layer_is_named_and_not_called_a_full_disk(tmp_path, damage: str) -> None:
    store, (ffn, _) = refit_store.LayerFiles(tmp_path), silu_ffn()
    store[0] = Fitted(ffn, 0.25, 0.8)
    path = store.path(0)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    else:
        save_file({"gate_proj": ffn.gate, "up_proj": ffn.up, "down_proj": ffn.down}, path)
    with pytest.raises(StochaError, match=rf"{path} cannot be read .*remove it and start again with the same command"):
        store[0]


def test_weights_scaled_for_learned_thresholds_are_an_original_to_refit() -> None:
    learned, trained = {"method": "learned_inputs"}, {"method": "full"}
    entry = StochaConfig(activation="relu", history=[learned]).resolve("silu")
    refit.check_original(entry, "model")
    with pytest.raises(StochaError, match="trained or refitted for relu already"):
        refit.check_original(replace(entry, history=[learned, trained]), "model")


def test_a_hub_data_set_is_streamed_for_calibration(checkpoint, text, monkeypatch) -> None:
    opened = []

    def open_local(name: str, config: Any, split: str, streaming: bool, found: Any) -> Any:
        opened.append((name, streaming))
        return open_data(str(text), config, split, streaming, ("json", [text]))

    open_data = data_rows._open
    monkeypatch.setattr(data_rows, "_open", open_local)
    first, again = (calibration_windows("org/terabytes", checkpoint(), 1024, 64, seed=0) for _ in range(2))
    assert opened == [("org/terabytes", True)] * 2
    assert first.shape == (16, 64) and torch.equal(first, again)
    text.write_text(text.read_text() + '{"text": "cut of')
    with pytest.raises(StochaError, match="the data set org/terabytes cannot be read"):
        calibration_windows("org/terabytes", checkpoint(), 1024, 64, seed=0)


def test_calibration_windows_are_varied_whole_and_reproducible(checkpoint, text) -> None:
    folder = checkpoint()
    first, again, other = (calibration_windows(str(text), folder, 1024, 64, seed) for seed in (0, 0, 1))
    assert first.shape == (16, 64) and torch.equal(first, again) and not torch.equal(first, other)
    assert set(first.unique().tolist()) <= set(range(4, 64))


def test_a_tensor_is_overwritten_in_its_own_dtype_and_no_other_changes(checkpoint) -> None:
    folder = checkpoint(dtype=torch.bfloat16, max_shard_size="20KB")
    tensors, before = Tensors(folder), all_tensors(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors.overwrite(name, torch.full((48, 32), 1.7))
    after = all_tensors(folder)
    assert torch.equal(after[name], torch.full((48, 32), 1.7, dtype=torch.bfloat16))
    assert all(torch.equal(before[key], after[key]) for key in before if key != name)
    with pytest.raises(ValueError, match=r"expected \[48, 32\]"):
        tensors.overwrite(name, torch.zeros(3))


def test_a_second_refit_to_the_same_output_is_refused_at_once(checkpoint, text, tmp_path, monkeypatch) -> None:
    source, refused = checkpoint(), []

    def start_another(*args: Any, **kwargs: Any) -> Any:
        if not refused:
            refused.append(None)
            for options in ({}, {"target_sparsity": 0.8}):
                with pytest.raises(StochaError, match=r"another refit is writing .*out: wait until it is done"):
                    convert(source, tmp_path / "out", refit=str(text), refit_tokens=512, **options)
        return refit_ffn(*args, **kwargs)

    monkeypatch.setattr(refit, "refit_ffn", start_another)
    convert(source, tmp_path / "out", refit=str(text), refit_tokens=512)
    assert refused and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("changed", ["weights", "text"])
def test_finished_layers_of_other_weights_or_text_are_not_used(
    checkpoint, text, tmp_path, monkeypatch, changed
) -> None:
    source, fits = checkpoint(), []

    def fit(*args: Any, **kwargs: Any) -> Any:
        fits.append(kwargs["seed"])
        if len(fits) == 2:
            raise KeyboardInterrupt
        return refit_ffn(*args, **kwargs)

    monkeypatch.setattr(refit, "refit_ffn", fit)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", refit=str(text), refit_tokens=512)
    if changed == "weights":
        tensors = Tensors(source)
        tensors.overwrite("model.layers.0.mlp.up_proj.weight", torch.ones(48, 32))
    else:
        text.write_text(text.read_text().replace("w9 ", "w8 "))
    convert(source, tmp_path / "out", refit=str(text), refit_tokens=512)
    assert fits == [0, 1, 0, 1]


# A model in memory.


@pytest.mark.parametrize("model_type", first_is_fast(["llama", "gemma2"]))
def test_a_model_in_memory_is_refitted_as_its_checkpoint_is(
    checkpoint, text, tmp_path, monkeypatch, model_type
) -> None:
    source = checkpoint(model_type)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda folder, **kwargs: tiny_tokenizer())
    convert(source, tmp_path / "out", refit=str(text), refit_tokens=512, target_sparsity=0.8)
    model = AutoModelForCausalLM.from_pretrained(source)
    assert refit_model(model, text, tiny_tokenizer(), tokens=512, target_sparsity=0.8) is model
    model.save_pretrained(tmp_path / "saved")
    converted, saved = all_tensors(tmp_path / "out"), all_tensors(tmp_path / "saved")
    assert converted.keys() == saved.keys() and all(torch.equal(converted[name], saved[name]) for name in saved)
    entries = [read_config(tmp_path / name)["stocha"] for name in ("out", "saved")]
    del entries[0]["source"]
    assert entries[0] == entries[1] and entries[0]["inference"] == "fatrelu"


def test_token_ids_and_a_patched_model_in_bfloat16_are_taken_too() -> None:
    windows = torch.randint(4, 64, (16, 32), generator=torch.Generator().manual_seed(2))
    native = tiny_model().to(torch.bfloat16)
    patched = tiny_model().to(torch.bfloat16)
    patch(patched, StochaConfig(p=0.4, source={"id": "org/model"}))
    for model in (native, patched):
        refit_model(model, windows)
        assert model.dtype == torch.bfloat16 and model.config.hidden_act == "relu"
        assert model.config.stocha["history"][0]["data"] == "token ids"
    assert patched.config.stocha["source"] == {"id": "org/model"}
    assert torch.equal(native(TOKENS).logits, patched(TOKENS).logits)
    with pytest.raises(StochaError, match="refitted for relu already"):
        refit_model(native, windows)


def test_a_model_that_cannot_be_refitted_stays_as_it_was(text) -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    windows = torch.randint(4, 64, (16, 32))
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (torch.full((16, 32), 64), {}, "from 0 to 63"),
        (windows.int(), {}, "expected int64"),
        (windows[0], {}, r"expected int64 \[windows, length\]"),
        (windows[:8, :4], {}, "token ids has 32 tokens in whole batches"),
        (text, {}, "needs a tokenizer"),
        ("", {}, "the data to refit on is ''"),
        (windows, {"target_sparsity": 1.0}, "between 0 and 1"),
        (text, {"tokens": 0}, "a whole number of at least 1"),
    ]
    for data_given, options, words in cases:
        with pytest.raises(StochaError, match=words):
            refit_model(model, data_given, **options)
    with pytest.raises(StochaError, match="the model is a Linear"):
        refit_model(torch.nn.Linear(2, 2), windows)
    assert type(model).__name__ == "LlamaForCausalLM" and "stocha" not in model.config.to_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {  # case -> (options, the sentence)
    "no tokens": ({"refit_tokens": 0}, "is 0: expected a whole number of at least 1"),
    "half a token": ({"refit_tokens": 0.5}, "is 0.5: expected a whole number"),
    "no data": ({"refit": ""}, "the data to refit on is ''"),
    "few tokens": ({"refit_tokens": 100}, "100 calibration tokens are too few .* at least 512, .* whole batches"),
    "short text": ({"refit_tokens": 9999999}, "tokens in whole batches .* at least 192"),
    "target": ({"target_sparsity": 1.5}, "1.5: expected a share of zeros between 0 and 1"),
    "a target of no number": ({"target_sparsity": True}, "True: expected a share of zeros between 0 and 1"),
    "activation": ({"activation": "stocha"}, "activation stocha: expected activation relu"),
    "threshold": ({"threshold": 0.1}, "threshold 0.1: .* chooses the thresholds"),
    "data": ({"refit": "nowhere.txt"}, "nowhere.txt does not exist"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_leave_nothing_behind(checkpoint, tmp_path, case: str) -> None:
    options, words = REFUSALS[case]
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "w4 w5 w6"}\n')
    source, before = checkpoint(), sorted(tmp_path.rglob("*"))
    with pytest.raises(StochaError, match=words):
        convert(source, tmp_path / "new" / "out", **{"refit": str(short), **options})
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_refuses_a_refit_in_one_sentence(checkpoint, text, tmp_path) -> None:
    options = ["--refit", text, "--target-sparsity", "1.5"]
    assert_refused(call_command("stocha-convert", checkpoint(), tmp_path / "out", *options), "between 0 and 1")


def test_a_refit_without_data_and_a_refit_of_a_refit_are_refused(checkpoint, text, tmp_path) -> None:
    with pytest.raises(StochaError, match="expected the data to refit on"):
        convert(checkpoint(), tmp_path / "out", target_sparsity=0.8)
    convert(checkpoint(), tmp_path / "once", refit=str(text), refit_tokens=512)
    with pytest.raises(StochaError, match="refitted for relu already: expected a model that runs silu"):
        convert(tmp_path / "once", tmp_path / "twice", refit=str(text), refit_tokens=512)


def test_weights_that_are_no_numbers_are_refused(checkpoint, text, tmp_path) -> None:
    folder = tmp_path / "source"
    checkpoint()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(StochaError, match=r"layers\.1\.mlp\.up_proj\.weight has values that are not finite"):
        convert(folder, tmp_path / "out", refit=str(text), refit_tokens=512)
    assert not (tmp_path / "out").exists()


def test_ffns_with_biases_are_refused(checkpoint, text, tmp_path) -> None:
    with pytest.raises(StochaError, match=r"mlp\.\w+\.bias in its FFNs"):
        convert(checkpoint(mlp_bias=True), tmp_path / "out", refit=str(text), refit_tokens=512)
