"""stocha-average: weights and thresholds are the weighted mean, the result loads anywhere, and checkpoints that do not
belong together are refused with nothing written.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from helpers import assert_refused, call_command, run_command, run_warm
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stocha_hf.conversion.averaging import average
from stocha_hf.conversion.convert import convert
from stocha_hf.errors import StochaError

TOKENS = torch.tensor([[1, 5, 9, 17, 33, 4, 8, 60]])


@pytest.fixture
def runs(checkpoint, tmp_path) -> list[Path]:
    """Three runs from one FATReLU conversion, each with weights, thresholds and a history of its own."""
    start = tmp_path / "start"
    convert(checkpoint(max_shard_size="20KB"), start, activation="fatrelu", threshold=0.25)
    return [trained(start, tmp_path / f"run-{seed}", seed) for seed in range(3)]


def trained(start: Path, run: Path, seed: int) -> Path:
    convert(start, run)
    torch.manual_seed(seed)
    for path in run.glob("*.safetensors"):
        changed = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in load_file(path).items()}
        save_file(changed, path, metadata={"format": "pt"})
    config = json.loads((run / "config.json").read_text())
    history = [{"method": "refit", "seed": 0}, {"method": "full", "seed": seed, "held_out_errors": [0.1, 0.2]}]
    config["stocha"] |= {"threshold": [0.25 + seed / 8, 0.5], "history": history}
    (run / "config.json").write_text(json.dumps(config))
    return run


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def stocha(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["stocha"]


@pytest.mark.slow
def test_the_mean_of_runs_is_written_and_loads_natively_and_with_remote_code(runs, tmp_path):
    out = tmp_path / "mean"
    done = run_command("stocha-average", *runs, out, "--shares", 2, 1, 1, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["shares"] == [0.5, 0.25, 0.25]
    parts, found = [tensors(run) for run in runs], tensors(out)
    assert found.keys() == parts[0].keys()
    for name, value in found.items():
        exact = sum(share * part[name].double() for share, part in zip((0.5, 0.25, 0.25), parts, strict=True))
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-6)
    assert stocha(out)["threshold"] == [0.25 + 0.25 / 8 + 0.25 / 4, 0.5]
    custom = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert custom.model.layers[0].mlp.threshold == stocha(out)["threshold"][0]
    native = AutoModelForCausalLM.from_pretrained(out)
    with custom.stocha_mode("relu"):
        assert torch.equal(custom(TOKENS).logits, native(TOKENS).logits)


def test_the_history_keeps_what_is_common_and_names_the_parts(runs, tmp_path):
    average(runs[:2], tmp_path / "mean")
    common, stage = stocha(tmp_path / "mean")["history"]
    assert common == {"method": "refit", "seed": 0} and stage["method"] == "average"
    assert [part["history"] for part in stage["of"]] == [stocha(run)["history"][1:] for run in runs[:2]]
    assert len({part["weights"] for part in stage["of"]}) == 2
    card = (tmp_path / "mean" / "README.md").read_text()
    assert "method: average" in card and "method: full" in card
    assert "held_out_errors" not in card, "config.json holds what is long"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_of_a_checkpoint_with_itself_is_that_checkpoint(checkpoint, tmp_path, dtype):
    convert(checkpoint(dtype=dtype), tmp_path / "a", activation="fatrelu", threshold=0.3)
    average([tmp_path / "a"] * 2, tmp_path / "mean")
    assert (tmp_path / "mean/model.safetensors").read_bytes() == (tmp_path / "a/model.safetensors").read_bytes()
    assert stocha(tmp_path / "mean")["threshold"] == 0.3


def test_dtype_and_files_are_the_first_ones(checkpoint, tmp_path):
    for name, dtype, shard in (("a", torch.bfloat16, "1GB"), ("b", torch.float32, "20KB")):
        convert(checkpoint(name=f"{name}-source", dtype=dtype, max_shard_size=shard), tmp_path / name)
    average([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")
    found, expected = tensors(tmp_path / "mean"), tensors(tmp_path / "a")
    assert all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items()
    )


def test_what_does_not_belong_together_is_refused_and_nothing_is_written(checkpoint, runs, tmp_path):
    out = tmp_path / "mean"
    assert_refused(call_command("stocha-average", runs[0], out), "1 checkpoint", "at least two")
    assert_refused(
        call_command("stocha-average", runs[0], tmp_path / "source", out), "source", "not a stocha checkpoint"
    )
    assert_refused(call_command("stocha-average", *runs, out, "--shares", 1, 2), "1 2", "3 positive numbers")
    relu = tmp_path / "relu"
    convert(runs[0], relu, activation="relu")
    wide = tmp_path / "wide"
    convert(checkpoint(name="wide-source", intermediate_size=96), wide, activation="fatrelu", threshold=0.25)
    for other, word in ((relu, "inference"), (wide, "intermediate_size")):
        with pytest.raises(StochaError, match=f"{other.name} has .*{word}.* in weights and thresholds only"):
            average([runs[0], other], out)
    scaled = tmp_path / "scaled"
    convert(runs[1], scaled)
    config = json.loads((scaled / "config.json").read_text())
    config["stocha"]["history"].append({"method": "learned_inputs", "share": 0.5})
    (scaled / "config.json").write_text(json.dumps(config))
    with pytest.raises(StochaError, match=r"scaled and .* have different scales"):
        average([runs[0], scaled], out)
    for bad in ([0, 1], [-1, 2], [float("nan"), 1]):
        with pytest.raises(StochaError, match="positive numbers"):
            average(runs[:2], out, shares=bad)
    with pytest.raises(StochaError, match="exists"):
        average(runs[:2], runs[2])
    assert not out.exists() and not list(tmp_path.glob(".*partial*"))


@pytest.mark.parametrize(
    "shares", [[1e308, 1e308], [5e-324, 1e308], [True, 1], [10**400, 1], ["1", 1], [], [float("inf"), 1]]
)
def test_shares_without_a_finite_positive_sum_are_refused(runs, tmp_path, shares):
    with pytest.raises(StochaError, match="expected 2 positive numbers, one per checkpoint, with a finite sum"):
        average(runs[:2], tmp_path / "mean", shares=shares)
    assert not (tmp_path / "mean").exists()


def test_weights_that_are_not_finite_are_refused(runs, tmp_path):
    path = max(runs[1].glob("*.safetensors"))
    weights = load_file(path)
    name = min(weights)
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(StochaError, match=f"the mean of {name} is not finite"):
        average(runs[:2], tmp_path / "mean")
    assert not (tmp_path / "mean").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("threshold", ["x", 10**400, [0.1], [0.1, 0.2, 0.3], [0.1, None], {"a": 1}])
def test_thresholds_that_no_model_has_are_refused(runs, tmp_path, threshold):
    config = json.loads((runs[1] / "config.json").read_text())
    config["stocha"]["threshold"] = threshold
    (runs[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(StochaError, match="threshold"):
        average(runs[:2], tmp_path / "mean")


KILLED = """
import os, signal, sys
from stocha_hf.checkpoints import tensors
from stocha_hf.conversion.averaging import average
overwrite, left = tensors.Tensors.overwrite, [int(sys.argv[1])]

def until_killed(*args):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    overwrite(*args)

tensors.Tensors.overwrite = until_killed
average(sys.argv[2:4], sys.argv[4], overwrite=True)
"""


@pytest.mark.slow
def test_a_kill_leaves_no_output_or_the_old_one_and_the_next_run_sweeps(runs, tmp_path):
    out = tmp_path / "mean"
    assert run_warm(KILLED, 3, *runs[:2], out).returncode == -signal.SIGKILL
    assert not out.exists() and len(list(tmp_path.glob(".mean.partial-*"))) == 1
    average(runs[:2], out)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    assert not list(tmp_path.glob(".*"))
    assert run_warm(KILLED, 5, *runs[1:], out).returncode == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_a_failure_midway_leaves_nothing(runs, tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stocha_hf.checkpoints.tensors.Tensors.overwrite", full)
    with pytest.raises(StochaError, match="No space left"):
        average(runs[:2], tmp_path / "mean")
    assert not (tmp_path / "mean").exists() and not list(tmp_path.glob(".*partial*"))
