"""Two gloo processes under `accelerate launch`, with the accelerate configs of the package: DDP and FSDP2.

The launcher runs in a fork of a process that has imported what it and its ranks need, and forks the ranks: fresh ones
would import for 10 seconds each. One launch is of fresh processes, by the command as installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BIN, Warm
from helpers.training import RELU, SILU, TOKENS, arguments, losses, run
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from stocha_hf.cli.train import CONFIGS
from stocha_hf.conversion.convert import convert

pytestmark = pytest.mark.slow  # two processes a test

PROBE = "helpers.distributed_probe"
PATH = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
ENV = {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATH}
Launch = Callable[..., list[list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    warm = Warm(PROBE, "accelerate.commands.launch", "stocha_hf.training.run", env=ENV)
    yield warm
    warm.close()


@pytest.fixture
def launch(warm: Warm) -> Launch:
    """launch(kind, folder, *runs, fresh=False): the notes of both ranks for each run, one after the other."""

    def launch(kind: str, folder: Path, *runs: list[str], fresh: bool = False) -> list[list[dict[str, Any]]]:
        folder.mkdir()
        options = {
            "config_file": CONFIGS / f"{kind}.yaml",
            "num_processes": 2,
            "mixed_precision": "no",
            "main_process_port": 0,
        }
        command = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
        command += ["-m", PROBE, str(folder), kind, *map(json.dumps, runs)]
        if fresh:
            command = [str(BIN / "accelerate"), "launch", *command]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | ENV)
        else:
            done = warm.run(f"from {PROBE} import launch; launch()", *command)
        assert done.returncode == 0, done.stderr[-20000:]
        return [
            [json.loads((folder / f"run{number}-rank{rank}.json").read_text()) for rank in range(2)]
            for number in range(len(runs))
        ]

    return launch


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_draw_their_own_noise_save_an_ordinary_checkpoint_and_train_as_one_process(
    checkpoint, text, tmp_path, launch, kind
):
    out, base = tmp_path / "out", tmp_path / "tied"
    convert(checkpoint(tie_word_embeddings=True), base)
    shared = {"schedule": RELU, "max_steps": 3, "save_steps": 3, "logging_steps": 1}
    alone = losses(run(base, text, tmp_path / "alone", per_device_train_batch_size=4, **shared))
    half = arguments(base, text, tmp_path / "both", per_device_train_batch_size=2, **shared)
    some_words = {"distill_weight": 1.0, "distill_vocabulary": 20}
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
    argv = arguments(base, text, out, teacher=base, distill_hidden=1.0, **some_words, **options)
    (first, second), (halves, _) = launch(kind, tmp_path / "notes", argv, half, fresh=kind == "ddp")
    assert halves["losses"] == pytest.approx(alone, rel=1e-4)  # the whole batch's
    assert first["sharded"] == second["sharded"] == kind.startswith("fsdp2")
    assert len(first["weights"]) == 4 and first["weights"] == second["weights"]
    assert len(set(first["weights"])) == 4
    assert not set(first["generators"]) & set(second["generators"])
    native = AutoModelForCausalLM.from_pretrained(out)
    custom = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(custom).__name__ == "StochaLlamaForCausalLM"
    assert torch.equal(native(TOKENS).logits, custom(TOKENS).logits)
    for folder in (out, out / "checkpoint-2"):
        with (
            safe_open(folder / "model.safetensors", "pt") as file,
            safe_open(base / "model.safetensors", "pt") as before,
        ):
            assert sorted(file.keys()) == sorted(before.keys())  # the tied head once
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["StochaLlamaForCausalLM"] and config["hidden_act"] == "relu"
    assert sorted(path.name for path in out.glob("*.py")) == ["mlx_stocha.py", "modeling_stocha.py"]


def test_a_sharded_run_clips_as_one_process_and_resumes_exactly(checkpoint, text, tmp_path, launch):
    """With what leaves weights whole for a while: accumulation, evaluations, and thresholds that are measured."""
    cut, out = tmp_path / "cut", tmp_path / "out"
    convert(
        checkpoint(tie_word_embeddings=True), cut, activation="silu", inputs=0.4, calibrate=text, inputs_train=True
    )
    shared = {"schedule": SILU, "max_steps": 4, "save_steps": 2, "logging_steps": 1, "max_grad_norm": 0.1}
    shared |= {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": text, "gradient_accumulation_steps": 2}
    alone = run(cut, text, tmp_path / "alone", per_device_train_batch_size=4, **shared)
    argv = arguments(cut, text, out, per_device_train_batch_size=2, **shared)
    ((first, second),) = launch("fsdp2_whole", tmp_path / "notes", argv)
    assert first["losses"] == pytest.approx(losses(alone), rel=1e-4)
    assert first["kept_whole"] == [True] * 4  # from a step's first micro-batch to its second
    history = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    for key, above in (("grad_norm", 0.1), ("eval_loss", 0)):
        found, expected = ([row[key] for row in rows if key in row] for rows in (history, alone))
        assert len(found) == 4 and min(found) > above
        assert found == pytest.approx(expected, rel=1e-3)
    whole = (out / "model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoint-4")
    (out / "model.safetensors").unlink()
    ((again, _),) = launch("fsdp2_whole", tmp_path / "again", argv)
    assert first["weights"] == second["weights"]
    assert again["weights"] == first["weights"][2:]
    assert (out / "model.safetensors").read_bytes() == whole


def test_ranks_learn_the_thresholds_of_one_process(checkpoint, text, tmp_path, launch):
    cut = tmp_path / "cut"
    convert(checkpoint(), cut, activation="silu", inputs=0.4, calibrate=text, inputs_train=True)
    shared = {"schedule": SILU, "max_steps": 3, "save_steps": 3, "logging_steps": 1}
    shared |= {"input_thresholds": "learned", "input_threshold_rate": 0.1, "train_embeddings": False}
    shared |= {"teacher": tmp_path / "source", "distill_weight": 1.0}
    shared |= {"distill_vocabulary": 52}  # with 12 others they are all words, however a batch is split
    alone = losses(run(cut, text, tmp_path / "alone", per_device_train_batch_size=4, **shared))
    both = arguments(cut, text, tmp_path / "both", per_device_train_batch_size=2, **shared)
    ((first, second),) = launch("ddp", tmp_path / "notes", both)
    assert first["losses"] == pytest.approx(alone, rel=1e-4)
    assert first["weights"] == second["weights"]
    states = [torch.load(tmp_path / name / "checkpoint-3" / "learned_inputs.pt") for name in ("alone", "both")]
    assert states[0]["logs"].abs().max() > 0.1
    torch.testing.assert_close(states[1]["logs"], states[0]["logs"], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(states[1]["target"], states[0]["target"], rtol=1e-5, atol=1e-6)
