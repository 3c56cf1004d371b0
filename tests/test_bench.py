"""stocha-bench: its records' keys; the speeds themselves are no matter of a test."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from helpers import assert_refused, call_command, tiny_model

from stocha_hf.conversion.convert import convert
from stocha_hf.measurement import speed, speed_ffn, speed_models
from stocha_hf.modeling_stocha import StochaConfig
from stocha_hf.patching import patch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
KEYS = {"shape", "dtype", "sparsity", "dense_ms", "sparse_ms", "speedup", "achieved_gbps"}


@pytest.mark.parametrize("script", ["decode_gpu_cuts", "decode_gpu_kernels"])
def test_without_a_gpu_its_benchmarks_say_so(script: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr("sys.argv", [f"{script}.py"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("there is no GPU here: expected a machine that has one\n")


@pytest.mark.slow
def test_an_ffn_record_has_the_keys_and_the_forced_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_ffn, "BYTES", 2**16)
    monkeypatch.setattr(speed, "READ", 2**20)
    records = list(speed_ffn.ffn_records((32, 200), torch.float32, tokens=[1, 3], sparsities=[0.0, 0.9], rounds=2))
    assert [(record["tokens"], record["sparsity"]) for record in records] == [(1, 0.0), (1, 0.9), (3, 0.0), (3, 0.9)]
    assert all(record.keys() >= KEYS for record in records)
    assert [records[0]["active"], records[2]["active"]] == [1.0, 1.0]
    assert records[1]["active"] == pytest.approx(0.1, abs=0.01) and 0.1 < records[3]["active"] < 0.3


@pytest.mark.slow
def test_forcing_zeros_on_a_model() -> None:
    model = tiny_model()
    patch(model, StochaConfig(activation="relu"))
    tokens = torch.randint(64, (1, 40))
    speed_models.force_sparsity(model, 0.9, tokens)
    record = speed_models.compare_decoding("tiny", tiny_model(), model, tokens[:, :8], new=4, rounds=1)
    assert record.model == "tiny" and record.sparsity > 0.6 and record.dense_ms > 0


@pytest.mark.slow
def test_a_converted_checkpoint_is_measured_against_its_native_class(tmp_path: Path) -> None:
    model = tiny_model()
    patch(model, StochaConfig(activation="relu"))
    model.save_pretrained(tmp_path / "relu")
    done = call_command(
        "stocha-bench", tmp_path / "relu", "--prompt", 4, "--new", 3, "--dtype", "float32", "--recall", 0.99, "--json"
    )
    record = json.loads(done.stdout)[0]
    assert record.keys() >= KEYS - {"shape"} and 0.2 < record["sparsity"] < 0.8


def test_a_checkpoint_that_cuts_inputs_and_has_no_zeros_is_measured(
    checkpoint, text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "READ", 2**20)
    convert(checkpoint(), tmp_path / "cut", inputs=0.4, calibrate=text, calibrate_tokens=2048)
    given = (tmp_path / "cut", "--prompt", 4, "--new", 8, "--dtype", "float32")
    told = re.search(r"at 0% zeros, (\d+)% of the inputs cut: dense", call_command("stocha-bench", *given).stdout)
    assert told is not None and int(told[1]) == pytest.approx(40, abs=10)
    assert_refused(call_command("stocha-bench", *given, "--recall", 0.9), "decodes with silu, which skips no neuron")


@pytest.mark.slow
def test_a_plot_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_ffn, "BYTES", 2**14)
    plot = tmp_path / "speed.png"
    done = call_command("stocha-bench", "--shape", "8,16", "--sparsity", 0, 0.5, "--plot", plot)
    assert done.returncode == 0 and done.stdout.count("FFN 8x16") == 2, done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
