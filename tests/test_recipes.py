"""Recipes: those of this repository parse, bad ones are refused in a sentence, and the command launches them."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from helpers import assert_refused, call_command
from helpers.training import arguments

from stocha_hf.cli.train import CONFIGS, main
from stocha_hf.spec import ACTIVATIONS
from stocha_hf.training.arguments import StochaArguments
from stocha_hf.training.run import parse, train

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
RECIPES = sorted(ROOT.glob("recipes/*/*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_parses_and_names_files_that_exist(path, tmp_path):
    data, args, model, schedule = parse(
        ["--config", str(path), "--use_cpu", "true", "--output_dir", str(tmp_path)], None
    )
    assert (data.dataset or data.datasets) and (model.model_name_or_path or args.model_config) and args.max_steps > 0
    own = {"gemma-3-270m": "gelu_pytorch_tanh"}.get(path.parent.name, "silu")
    keeps_its_own = ("adapt", "teacher", "sparsify", "long", "cut")  # teachers, or cut inputs
    ends_with = own if path.stem in keeps_its_own else "relu"
    assert ACTIVATIONS[schedule.phases[-1].activation].native == ends_with
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for name in re.findall(r"recipes/[\w./-]+\.(?:py|yaml)", header):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_config_loads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes == yaml.safe_load(path.read_text())["num_processes"]


def launched(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command that stocha-train becomes."""
    monkeypatch.setattr(os, "execv", lambda path, command: sys.exit(str(command)))
    monkeypatch.setattr(sys, "argv", ["stocha-train", *argv])
    with pytest.raises(SystemExit) as end:
        main()
    return ast.literal_eval(str(end.value.code))


@pytest.mark.parametrize("visible", [None, "3,5"])
def test_the_config_for_one_gpu_shows_a_process_one_gpu_also_of_those_that_are_visible(visible, monkeypatch):
    """Else Trainer splits batches over all of them."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    command = launched(["--accelerate", "single", "--config", "recipe.yaml", "--seed", "1"], monkeypatch)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command[3:]))
    words, env = prepare_simple_launcher_cmd_env(args)
    assert words[-5:] == ["-m", "stocha_hf.cli.train", "--config=recipe.yaml", "--seed", "1"]
    assert env["CUDA_VISIBLE_DEVICES"] == (visible or "0")[0] and not args.multi_gpu


def test_a_process_takes_one_gpu_where_nothing_launched_it(tmp_path, monkeypatch):
    from transformers import TrainingArguments

    args = StochaArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    assert args.n_gpu == 1 and args.train_batch_size == args.per_device_train_batch_size


@pytest.mark.parametrize(("capability", "fast"), [("AVX2", False), ("AVX512", True)])
def test_bf16_is_the_default_on_a_cpu_only_where_it_is_fast(tmp_path, monkeypatch, recwarn, capability, fast):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert StochaArguments(output_dir=str(tmp_path), use_cpu=True).bf16 is fast
    told = [str(warning.message) for warning in recwarn]
    assert not any("bf16" in text for text in told), "nobody asked for it"
    assert StochaArguments(output_dir=str(tmp_path), use_cpu=True, bf16=True).bf16
    assert any("bf16" in str(warning.message) for warning in recwarn) is not fast


def test_processes_are_passed_on(monkeypatch):
    command = launched(["--accelerate", "fsdp2", "--num_processes", "4", "--config", "a.yaml"], monkeypatch)
    assert command[3:7] == ["--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", "4"]


NESTED = "a: &a [x,x,x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi"))
START = "model_name_or_path: absent-model\ndataset: absent.txt\noutput_dir: out\nuse_cpu: true\nbf16: false\n"
SCHEDULE = "schedule: [{activation: relu, until: 1.0}]\n"
BAD_RECIPES = {  # the file, and words of the sentence
    "broken YAML": ("schedule: [{activation: relu", "recipe.yaml is not YAML, line 1"),
    "a tab": ("a:\n\t- b", "recipe.yaml is not YAML, line 2"),
    "binary": (bytes(range(256)), "recipe.yaml is not YAML"),
    "not UTF-8": (b"output_dir: \xff\xfe", "recipe.yaml is not YAML"),
    "nested aliases": (NESTED, "the alias *a is not allowed"),
    "an alias of itself": ("a: &a [*a]", "the alias *a is not allowed"),
    "100,000 brackets": ("a: " + "[" * 100_000, "recipe.yaml is not YAML"),
    "a Python object": ("a: !!python/object/apply:os.system [true]", "recipe.yaml is not YAML, line 1"),
    "too large": ("#" * 2_000_000, "has 2000000 bytes: expected at most"),
    "a list": ("- a", "holds no keys"),
    "a word": ("relu", "holds no keys"),
    "nothing": ("", "holds no keys"),
    "numbers for keys": ("1: 2", "holds no keys"),
    "an unknown key": (START + "shedule: []\n", "the key 'shedule'"),
    "no model": (START.partition("\n")[2] + SCHEDULE, "model_name_or_path is missing"),
    "no schedule": (START, "schedule is missing"),
    "env that is a word": (START + "env: x\n", "env is 'x'"),
    "a list for an activation": (START + "schedule: [{activation: [relu], until: 1.0}]\n", "activation of a phase"),
    "a mapping for an activation": (START + "schedule: [{activation: {a: 1}, until: 1.0}]\n", "activation of a phase"),
    "a list for anneal": (START + "schedule: [{activation: relu, anneal: [a], until: 1}]\n", "anneal of a phase"),
    "a word for until": (START + "schedule: [{activation: relu, until: end}]\n", "phases end at ['end']"),
    "a schedule of words": (START + "schedule: [relu]\n", "schedule is ['relu']"),
    "no tokens": (START + SCHEDULE + "max_length: 0\n", "max_length is 0"),
    "a batch of -1": (START + SCHEDULE + "per_device_train_batch_size: -1\n", "per_device_train_batch_size is -1"),
    "no accumulation": (START + SCHEDULE + "gradient_accumulation_steps: 0\n", "gradient_accumulation_steps is 0"),
    "no steps": (START + SCHEDULE + "max_steps: 0\n", "max_steps is 0"),
    "a word for a number": (START + SCHEDULE + "max_steps: many\n", "max_steps is 'many': expected a whole number"),
    "a fraction of a step": (START + SCHEDULE + "max_steps: 1.5\n", "max_steps is '1.5': expected a whole number"),
    "a list for a number": (START + SCHEDULE + "learning_rate: [1]\n", "learning_rate is [1]: expected one value"),
    "a mapping for a word": (START + SCHEDULE + "optim: {a: 1}\n", "optim is {'a': 1}: expected one value"),
    "no number": (START + SCHEDULE + "learning_rate:\n", "learning_rate is empty"),
    "a number that is none": (START + SCHEDULE + "learning_rate: .nan\n", "learning_rate is nan"),
    "an endless number": (START + SCHEDULE + "learning_rate: .inf\n", "learning_rate is inf"),
    "a word for a flag": (START + SCHEDULE + "packing: perhaps\n", "packing is 'perhaps': expected true or false"),
    "an unknown choice": (START + SCHEDULE + "save_strategy: never\n", "save_strategy is 'never': expected one of"),
    "an unknown scheduler": (START + SCHEDULE + "lr_scheduler_type: wavy\n", "wavy"),
    "a negative seed": (START + SCHEDULE + "seed: -1\n", "seed is -1"),
    "no data": (START + SCHEDULE, "absent.txt does not exist"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_recipe_that_cannot_run_is_one_sentence_and_leaves_nothing(case, tmp_path, monkeypatch):
    text, words = BAD_RECIPES[case]
    (tmp_path / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.chdir(tmp_path)
    assert_refused(call_command("stocha-train", "--config", "recipe.yaml"), words)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


BAD_WORDS = {
    "a recipe that is not there": (["--config", "absent.yaml"], "absent.yaml is not a file"),
    "a folder": (["--config", "."], "is not a file"),
    "an absent home": (["--config", "~nouser/x.yaml"], "~nouser/x.yaml"),
    "no name": (["--config"], "expected one argument"),
    "an unknown word": (["--use_cpu", "true", "--bf16", "false", "--shedule", "x"], "shedule"),
    "a word for a number": (["--max_steps", "many"], "max_steps is 'many'"),
    "an unknown way to launch": (["--accelerate", "dd"], "--accelerate is dd: expected one of cpu, ddp, fsdp2"),
    "no processes": (["--accelerate", "ddp", "--num_processes", "0"], "--num_processes is 0"),
    "processes of nothing": (["--num_processes", "2"], "without --accelerate"),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_a_command_line_that_cannot_run_is_one_sentence(case, tmp_path, monkeypatch):
    argv, words = BAD_WORDS[case]
    monkeypatch.chdir(tmp_path)
    assert_refused(call_command("stocha-train", *argv), words)
    assert not list(tmp_path.iterdir())


def test_train_takes_keys_or_a_file_and_returns_what_it_left(base, text, tmp_path):
    keys = {"model_name_or_path": base, "dataset": text, "max_length": 32, "per_device_train_batch_size": 2}
    keys |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    keys |= {"schedule": [{"activation": "relu", "until": 1.0}], "gradient_checkpointing": False}
    result = train(keys, output_dir=tmp_path / "one", max_steps=2)
    assert result.folder == tmp_path / "one" and (result.folder / "model.safetensors").is_file()
    assert result.steps == 2 and 0 < result.sparsity < 1 and result.loss > 1 and result.tokens > 2 * 2
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(keys, default=str))))
    again = train(tmp_path / "recipe.yaml", output_dir=tmp_path / "two", max_steps=2)
    told = again.to_dict()
    assert json.loads(json.dumps(told))["loss"] == result.loss and told["folder"] == str(tmp_path / "two")


def test_keys_that_trl_refuses_together_are_one_sentence_and_leave_nothing(base, text, tmp_path):
    argv = arguments(base, text, tmp_path / "out", eval_strategy="steps", eval_steps=1)
    done = call_command("stocha-train", *argv)
    assert done.returncode == 2 and "eval_dataset" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_prints_a_line_a_log_and_no_warning(base, text, tmp_path):
    options = {"max_steps": 4, "logging_steps": 2, "save_strategy": "no"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        done = call_command("stocha-train", *arguments(base, text, tmp_path / "out", **options))
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and [line.partition(":")[0] for line in lines] == [
        "step 0/4",
        "step 2/4",
        "step 2/4",
        "step 4/4",
        "step 4/4",
    ]
    assert lines[0] == "step 0/4: stocha, p 0.5 to 0.1, until 0.5 of the run"
    assert "\r" not in done.stderr  # no progress bar in pieces
    assert re.fullmatch(
        r"step 2/4: loss \d\.\d+, zeros \d\d\.\d%, p 0\.\d\d, learning rate \S+, [\d,]+ tokens/s", lines[1]
    )
    logs = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert "sparsity/layer_00" in logs[0]
