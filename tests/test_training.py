"""Training in one process: what the schedule does to the model, what is logged and saved, resuming, LoRA, and
refusals.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import signal

import pytest
import torch
from datasets import Dataset
from helpers import run_warm, tiny_model
from helpers.training import RELU, SILU, TOKENS, arguments, losses, run
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, TrainerCallback

from stocha_hf.conversion.convert import convert
from stocha_hf.errors import StochaError
from stocha_hf.modeling_stocha import StochaConfig, stocha_mlps
from stocha_hf.patching import patch, set_activation
from stocha_hf.training.checkpointing import last_checkpoint
from stocha_hf.training.compiled_layers import compile_layers, narrow_stream
from stocha_hf.training.run import parse
from stocha_hf.training.run import run as run_training
from stocha_hf.training.trainer import StochaTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
NO_CPP = {"disable_cpp_codegen": True}  # inductor's graphs with PyTorch's kernels, which need no g++
KILLED_IN_THE_FOURTH_STEP = """
import os, signal
from stocha_hf.cli.train import main
from stocha_hf.training.trainer import StochaTrainer
whole_step = StochaTrainer.training_step

def step(trainer, *args, **kwargs):
    if trainer.state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole_step(trainer, *args, **kwargs)

StochaTrainer.training_step = step
main("recipe")
"""


@pytest.fixture
def modes(monkeypatch) -> list[tuple[str, float]]:
    """(activation, p) of every training step, as the model's first layer has them."""
    seen: list[tuple[str, float]] = []
    step = StochaTrainer.training_step

    def training_step(self, model, *args, **kwargs):
        mlp = stocha_mlps(model)[0]
        seen.append((mlp.activation, round(float(mlp.p), 6)))
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(StochaTrainer, "training_step", training_step)
    return seen


def test_a_run_follows_its_schedule_logs_it_and_leaves_a_publishable_relu_checkpoint(base, text, tmp_path, modes):
    out = tmp_path / "out"
    history = run(base, text, out)
    assert modes == [("stocha", 0.5), ("stocha", 0.4), ("stocha", 0.3), ("stocha", 0.2)] + [("relu", 0.3)] * 4
    logs = [entry for entry in history if "loss" in entry]
    assert [("activation/stocha" in log, log.get("p")) for log in logs[:2]] == [
        (True, 0.4),
        (True, pytest.approx(0.2)),
    ]
    assert all("activation/relu" in log and "p" not in log for log in logs[2:])
    for log in logs:
        assert {"tokens_per_second", "grad_norm", "learning_rate"} <= set(log)
        per_layer = [log["sparsity/layer_00"], log["sparsity/layer_01"]]
        assert log["sparsity"] == pytest.approx(sum(per_layer) / 2, abs=1e-6) and 0 < log["sparsity"] < 1
    rates = [log["learning_rate"] for log in logs]
    assert rates == sorted(rates, reverse=True)  # the schedule of the learning rate runs on over the switch
    config = json.loads((out / "config.json").read_text())
    assert config["hidden_act"] == config["stocha"]["activation"] == config["stocha"]["inference"] == "relu"
    assert config["use_cache"] is True
    [stage] = config["stocha"]["history"]
    assert [phase["activation"] for phase in stage["schedule"]] == ["stocha", "relu"] and stage["method"] == "full"
    native = AutoModelForCausalLM.from_pretrained(out)
    custom = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert torch.equal(native(TOKENS).logits, custom(TOKENS).logits)
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card and "| `model.eval()` | relu |" in card
    early = json.loads((out / "checkpoint-4" / "config.json").read_text())
    assert early["stocha"]["activation"] == "stocha" and early["hidden_act"] == "silu"


@pytest.mark.slow
def test_a_second_stage_adds_to_the_history_and_a_native_model_is_patched(base, checkpoint, text, tmp_path):
    run(base, text, tmp_path / "first", max_steps=2, save_steps=2)
    run(tmp_path / "first", text, tmp_path / "second", max_steps=2, save_steps=2, schedule=RELU)
    stages = json.loads((tmp_path / "second" / "config.json").read_text())["stocha"]["history"]
    assert [len(stage["schedule"]) for stage in stages] == [2, 1]
    run(checkpoint(name="native"), text, tmp_path / "third", max_steps=2, save_steps=2)
    stocha = json.loads((tmp_path / "third" / "config.json").read_text())["stocha"]
    assert stocha["base"] == "silu" and stocha["source"]["id"] == "native"


@pytest.mark.slow
def test_what_is_recorded_of_a_distillation_is_whole_and_tells_no_local_path(base, text, tmp_path):
    out = tmp_path / "out"
    options = {"teacher": base, "distill_weight": 0.7, "distill_hidden": 0.5, "max_steps": 2, "save_steps": 2}
    run(base, text, out, **options)
    for file in ("config.json", "README.md"):
        assert str(tmp_path) not in (out / file).read_text()
    [stage] = json.loads((out / "config.json").read_text())["stocha"]["history"]
    assert (stage["dataset"], stage["teacher"]) == ("text.jsonl", "base")
    assert (stage["distill_weight"], stage["distill_hidden"]) == (0.7, 0.5)


def test_a_teacher_computes_in_the_students_precision(base, text, tmp_path):
    """So a student that is still its teacher has nothing to learn, to the last bit of bfloat16."""
    options = {"teacher": base, "distill_weight": 1.0, "distill_hidden": 1.0, "bf16": True, "schedule": SILU}
    [log] = run(base, text, tmp_path / "out", max_steps=1, save_steps=1, logging_steps=1, **options)[:1]
    assert log["kl"] == log["hidden_error"] == 0


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_command_to_the_same_losses(base, text, tmp_path):
    """With StochA too: its noise comes from the generator whose state a checkpoint holds."""
    whole = losses(run(base, text, tmp_path / "whole", max_steps=8, logging_steps=1, save_steps=2))
    argv = arguments(base, text, tmp_path / "killed", max_steps=8, logging_steps=1, save_steps=2)
    assert run_warm(KILLED_IN_THE_FOURTH_STEP, *argv).returncode == -signal.SIGKILL
    stopped_at = last_checkpoint(tmp_path / "killed")
    assert stopped_at is not None and stopped_at.name == "checkpoint-2"
    run_training(*parse(argv, None))
    state = json.loads((tmp_path / "killed" / "checkpoint-8" / "trainer_state.json").read_text())
    assert losses(state["log_history"]) == whole
    assert [row["num_tokens"] for row in state["log_history"] if "loss" in row] == [128 * i for i in range(1, 9)]


def test_an_unfinished_checkpoint_is_not_resumed_from(tmp_path):
    for step, state in ((4, {"global_step": 4}), (8, {"global_step": 8}), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state:
            (folder / "trainer_state.json").write_text(json.dumps(state))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    (tmp_path / "checkpoint-8" / "trainer_state.json").write_text('{"global_st')
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert last_checkpoint(tmp_path / "nothing") is None


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["[{activation: stocha, p: 1.0, until: 1.0}]", RELU])
def test_accumulated_batches_give_the_large_batchs_losses(base, text, tmp_path, schedule):
    shared = {"schedule": schedule, "max_steps": 4, "save_steps": 4, "logging_steps": 1}
    large = losses(run(base, text, tmp_path / "large", per_device_train_batch_size=8, **shared))
    small = run(base, text, tmp_path / "small", per_device_train_batch_size=2, gradient_accumulation_steps=4, **shared)
    assert losses(small) == pytest.approx(large, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["bf16", "gradient_checkpointing"])
def test_options_of_the_trainer_work(base, text, tmp_path, option):
    out = tmp_path / "out"
    run(base, text, out, max_steps=2, save_steps=2, logging_steps=9, **{option: True})
    before, after = (AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits for folder in (base, out))
    assert after.isfinite().all() and not torch.equal(before, after)


@pytest.mark.slow
def test_layers_compiled_by_the_trainer_train_as_eager_ones(base, text, tmp_path):
    """And nothing else is compiled: a graph for each activation, with and without its zeros counted."""
    phases = "[{activation: mean, until: 0.5}, {activation: relu, until: 1.0}]"
    shared = {"schedule": phases, "max_steps": 4, "save_steps": 4, "logging_steps": 2}
    eager = losses(run(base, text, tmp_path / "eager", **shared))
    torch._dynamo.reset()
    counters.clear()
    compiled = run(base, text, tmp_path / "out", torch_compile=True, torch_compile_backend="aot_eager", **shared)
    assert losses(compiled) == pytest.approx(eager, rel=1e-4)
    assert counters["stats"]["unique_graphs"] == 5  # one is the loss
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_act == "relu"


@pytest.mark.slow
def test_rows_of_token_ids_train_without_preparation(base, tmp_path):
    rows = torch.randint(4, 64, (40, 16), generator=torch.Generator().manual_seed(0)).tolist()
    Dataset.from_dict({"input_ids": rows}).to_parquet(tmp_path / "rows.parquet")
    options = {"packing": False, "dataset_kwargs": '{"skip_prepare_dataset": true}', "max_steps": 2, "save_steps": 2}
    run(base, tmp_path / "rows.parquet", tmp_path / "out", logging_steps=1, **options)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert [entry["num_tokens"] for entry in state["log_history"] if "loss" in entry] == [64, 128]


def test_the_residual_stream_is_narrow_under_autocast_only():
    model = tiny_model()
    narrow_stream(model)
    seen = []
    model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    model(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        model(TOKENS)
    assert seen == [torch.float32, torch.bfloat16] and model.model.embed_tokens.weight.dtype == torch.float32


@pytest.mark.slow
def test_all_layers_share_one_compiled_graph_an_activation():
    model = tiny_model(num_hidden_layers=4).train()
    patch(model, StochaConfig(threshold=[0.0, 0.1, 0.2, 0.3]))
    torch._dynamo.reset()
    counters.clear()
    compile_layers(model, fullgraph=True, options=NO_CPP)  # by inductor: others keep no float as an input
    graphs = []
    for activation in ("stocha", "fatrelu", "stocha"):
        set_activation(model, activation)
        model(TOKENS, use_cache=False)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 3, 3]  # a threshold of 0, and any other


@pytest.mark.slow
def test_ddp_does_not_split_the_layer_that_is_compiled(tmp_path, fresh_compiler):
    def graphs(wrap) -> int:
        torch._dynamo.reset()
        model, found = tiny_model(intermediate_size=4096).train(), []  # a layer is larger than DDP's first bucket
        patch(model, StochaConfig())

        def backend(graph, inputs):
            found.append(graph)
            return graph.forward

        undo = compile_layers(model, backend=backend)
        try:
            wrap(model)(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        finally:
            undo()
        return len(found)

    split = torch._dynamo.config.optimize_ddp
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert graphs(torch.nn.parallel.DistributedDataParallel) == graphs(lambda model: model) > 0
    finally:
        torch.distributed.destroy_process_group()
    assert torch._dynamo.config.optimize_ddp == split


@pytest.mark.slow
def test_distillation_from_the_model_itself_costs_nothing_under_its_own_activation(base, text, tmp_path):
    options = {"teacher": base, "distill_weight": 1.0, "max_steps": 2, "save_steps": 2, "logging_steps": 1}
    silu = run(base, text, tmp_path / "silu", schedule="[{activation: silu, until: 1.0}]", **options)
    assert silu[0]["kl"] == pytest.approx(0, abs=1e-6) and silu[0]["loss"] == pytest.approx(0, abs=1e-6)
    relu = run(base, text, tmp_path / "relu", schedule=RELU, **options)
    assert relu[0]["kl"] > 0.01 and relu[0]["loss"] == pytest.approx(relu[0]["kl"], rel=1e-4)
    assert relu[0]["lm_loss"] > 1


@pytest.mark.slow
def test_distillation_layer_by_layer_brings_the_streams_closer(base, text, tmp_path):
    options = {"teacher": base, "distill_weight": 1.0, "schedule": RELU, "max_steps": 20, "save_steps": 20}
    options |= {"logging_steps": 1, "learning_rate": 3e-3}
    history = run(base, text, tmp_path / "with", distill_hidden=1.0, **options)
    first, last = history[0], [log for log in history if "loss" in log][-1]
    assert first["loss"] == pytest.approx(first["kl"] + first["hidden_error"], rel=1e-3)
    assert last["hidden_error"] < 0.8 * first["hidden_error"]
    without = run(base, text, tmp_path / "without", **options)
    assert "hidden_error" not in without[0] and without[0]["kl"] == pytest.approx(first["kl"], rel=1e-4)


def test_the_layers_error_loses_its_weight_in_a_straight_line(base, text, tmp_path):
    options = {"teacher": base, "distill_weight": 1.0, "schedule": RELU, "max_steps": 4, "save_steps": 4}
    options |= {"logging_steps": 1, "distill_hidden": 2.0, "distill_hidden_end": 0.4}
    history = [log for log in run(base, text, tmp_path / "out", **options) if "hidden_error" in log]
    assert [(log["loss"] - log["kl"]) / log["hidden_error"] for log in history] == pytest.approx(
        [2.0, 1.6, 1.2, 0.8], rel=1e-3
    )
    [stage] = json.loads((tmp_path / "out" / "config.json").read_text())["stocha"]["history"]
    assert (stage["distill_hidden"], stage["distill_hidden_end"]) == (2.0, 0.4)


@pytest.mark.slow
def test_a_sparsity_target_is_met_and_its_thresholds_are_saved(base, text, tmp_path):
    out = tmp_path / "out"
    history = run(
        base,
        text,
        out,
        schedule=RELU,
        target_sparsity=0.9,
        threshold_shift=True,
        max_steps=60,
        save_steps=60,
        learning_rate=3e-3,
        logging_steps=1,
    )
    sparsity = [entry["sparsity"] for entry in history if "sparsity" in entry]
    assert sparsity[0] < 0.7 < sparsity[-1] and "l1_coefficient" in history[1]
    stocha = json.loads((out / "config.json").read_text())["stocha"]
    assert stocha["inference"] == "fatrelu" and len(stocha["threshold"]) == 2
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    zeros = []
    for mlp in stocha_mlps(model):
        mlp.down_proj.register_forward_pre_hook(lambda _, args: zeros.append((args[0] == 0).float().mean().item()))
    rows = [
        [int(word[1:]) for word in json.loads(line)["text"].split()] for line in text.read_text().splitlines()[:32]
    ]
    model(torch.tensor(rows)[:, :32])
    assert sum(zeros) / len(zeros) == pytest.approx(0.9, abs=0.03)


RISING = "[{activation: fatrelu, sparsity: [0.6, 0.9], until: 0.5}, {activation: fatrelu, sparsity: 0.9, until: 1}]"


@pytest.mark.slow
def test_the_schedule_raises_thresholds_and_the_checkpoint_keeps_them(base, text, tmp_path):
    out = tmp_path / "out"
    options = {"schedule": RISING, "max_steps": 12, "save_steps": 3, "logging_steps": 1, "learning_rate": 3e-3}
    history = run(base, text, out, **options)
    shares = [entry["sparsity"] for entry in history if "sparsity" in entry]
    assert shares[0] == pytest.approx(0.6, abs=0.05) and shares[-6:] == pytest.approx([0.9] * 6, abs=0.03)
    stocha = json.loads((out / "config.json").read_text())["stocha"]
    loaded = stocha_mlps(AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True))
    assert stocha["inference"] == "fatrelu" and [mlp.threshold for mlp in loaded] == stocha["threshold"]
    assert min(stocha["threshold"]) > 0
    for step in (9, 12):
        shutil.rmtree(out / f"checkpoint-{step}")
    assert losses(run(base, text, out, **options)) == losses(history)  # resumed with the thresholds of step 6


@pytest.mark.slow
def test_moving_thresholds_compiles_nothing_again(base, text, tmp_path, monkeypatch):
    graphs, step = [], StochaTrainer.training_step

    def counted(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        graphs.append(counters["stats"]["unique_graphs"])
        return loss

    monkeypatch.setattr(StochaTrainer, "training_step", counted)
    torch._dynamo.reset()
    counters.clear()
    options = {"torch_compile": True, "max_steps": 5, "save_steps": 5, "logging_steps": 100}
    with torch._inductor.config.patch(NO_CPP):
        run(base, text, tmp_path / "out", schedule=RISING, **options)
    assert 0 < graphs[1] == graphs[4]  # the thresholds move before each step


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["use_rslora", "use_dora"])
def test_lora_saves_an_adapter_and_a_merged_model_with_the_same_logits(base, text, tmp_path, variant):
    from peft import PeftModel

    out, relu = tmp_path / "out", tmp_path / "relu"
    lora = {"use_peft": True, "schedule": RELU, "lora_r": 4, "max_steps": 4, "learning_rate": 1e-2}
    with pytest.raises(StochaError, match="infers with silu but its adapter would be trained for relu"):
        run(base, text, out, **lora)
    assert not out.exists()
    convert(base, relu, activation="relu")
    run(relu, text, out, **{variant: True}, **lora)
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(relu) and adapter[variant]
    assert {"gate_proj", "q_proj"} <= set(adapter["target_modules"])
    start = AutoModelForCausalLM.from_pretrained(relu, trust_remote_code=True)
    before = start(TOKENS).logits
    adapted = PeftModel.from_pretrained(start, out)(TOKENS).logits
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert (adapted - before).abs().max() > 1e-3
    torch.testing.assert_close(merged(TOKENS).logits, adapted, rtol=1e-4, atol=1e-4)
    assert merged.config.hidden_act == "relu" and merged.config.stocha["history"][0]["method"] == "lora"


@pytest.mark.slow
def test_streamed_data_trains(base, text, tmp_path):
    values = losses(run(base, text, tmp_path / "out", dataset_streaming=True, max_steps=4, save_steps=4))
    assert len(values) == 2 and all(map(math.isfinite, values))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"packing": False}, {"packing_strategy": "bfd"}, {"dataset_streaming": True}])
def test_prompts_that_leave_no_room_for_an_answer_have_no_loss(base, tmp_path, options):
    """A step of such rows alone has a loss of 0, and data of such rows alone is refused."""
    short, long = "w7", " ".join(["w7"] * 40)  # of max_length 32
    for name, prompts in (("some", [short, *[long] * 7]), ("none", [long] * 8)):
        rows = [{"prompt": prompt, "completion": "w8 w9", "finished": True} for prompt in prompts]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"packing": "dataset_streaming" not in options, "per_device_train_batch_size": 1} | options
    found = losses(run(base, tmp_path / "some.jsonl", tmp_path / "out", logging_steps=1, **options))
    assert len(found) == 8 and all(math.isfinite(loss) for loss in found) and max(found) > 1
    assert not options["packing"] or found.count(0) == 7
    with pytest.raises(StochaError, match="no row of the train data has a token to learn within max_length 32: "):
        run(base, tmp_path / "none.jsonl", tmp_path / "not", **options)
    with pytest.raises(StochaError, match="no row of the eval data has a token to learn"):
        run(base, tmp_path / "some.jsonl", tmp_path / "not", eval_dataset=tmp_path / "none.jsonl", **options)
    assert not (tmp_path / "not").exists()


@pytest.mark.slow
def test_chat_data_trains(base, tmp_path):
    path = tmp_path / "chat.jsonl"
    row = {"messages": [{"role": "user", "content": "w9 w17"}, {"role": "assistant", "content": "w20 w21"}]}
    path.write_text((json.dumps(row) + "\n") * 40)
    values = losses(run(base, path, tmp_path / "out", packing=False, schedule=RELU, max_steps=8, learning_rate=1e-2))
    assert values[-1] < values[0]


@pytest.mark.slow
def test_tensorboard_receives_the_logs(base, text, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    run(base, text, tmp_path / "out", report_to="tensorboard", max_steps=4, save_steps=4)
    events = EventAccumulator(str(next((tmp_path / "events").rglob("events*")).parent))
    events.Reload()
    assert {"train/loss", "train/sparsity", "train/p", "train/activation/stocha"} <= set(events.Tags()["scalars"])


REFUSALS = {
    "another loss": ({"loss_type": "dft"}, "loss_type is 'dft'"),
    "LoRA under moving thresholds": ({"schedule": RISING, "use_peft": True}, "which an adapter cannot hold"),
    "a sparsity of relu": ({"schedule": "[{activation: relu, sparsity: 0.9, until: 1.0}]"}, "with fatrelu only"),
    "a sparsity of 1": ({"schedule": "[{activation: fatrelu, sparsity: 1, until: 1.0}]"}, "sparsity is 1"),
    "liger": ({"use_liger_kernel": True}, "use_liger_kernel is true"),
    "an unknown option": ({"scheduel": "x"}, "scheduel"),
    "p outside [0, 1]": ({"schedule": "[{activation: stocha, p: 2, until: 1.0}]"}, "p is 2"),
    "phases that do not cover the run": ({"schedule": "[{activation: relu, until: 0.5}]"}, "end at until: 1.0"),
    "a weight outside [0, 1]": ({"distill_weight": 2}, "distill_weight is 2"),
    "layers' errors without a teacher": ({"distill_hidden": 1.0}, "distill_hidden is 1.0 and teacher None"),
    "an end without a beginning": ({"distill_hidden_end": 0.0}, "distill_hidden_end is 0.0 and distill_hidden 0.0"),
    "a target outside [0, 1]": ({"target_sparsity": 90}, "target_sparsity is 90"),
    "thresholds without a target": ({"threshold_shift": True}, "threshold_shift is true and target_sparsity None"),
    "thresholds for nothing but zeros": ({"threshold_shift": True, "target_sparsity": 1}, "target_sparsity 1.0"),
    "streaming without max_steps": ({"dataset_streaming": True, "max_steps": -1}, "without max_steps"),
    "no dataset": ({"dataset": "absent/data.parquet"}, "absent/data.parquet does not exist"),
    "no model": ({"model_name_or_path": "./absent"}, "absent"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(base, text, tmp_path, case):
    changes, words = REFUSALS[case]
    with pytest.raises(StochaError, match=words) as refusal:
        run_training(*parse(arguments(base, text, tmp_path / "out", **changes), None))
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


def test_a_teacher_with_another_vocabulary_is_refused(base, checkpoint, text, tmp_path):
    other = checkpoint(name="other", vocab_size=80)
    with pytest.raises(StochaError, match=r"80.*64|64.*80"):
        run(base, text, tmp_path / "out", teacher=other)


def test_layer_by_layer_distillation_from_another_shape_is_refused(base, checkpoint, text, tmp_path):
    other = checkpoint(name="other", hidden_size=48)
    with pytest.raises(StochaError, match="2 layers of width 48 and the student 2 of width 32"):
        run(base, text, tmp_path / "out", teacher=other, distill_hidden=1.0)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_program_is_not_resumed_from(base, text, tmp_path):
    out = tmp_path / "out"
    run(base, text, out, max_steps=4, save_steps=4)
    (out / "checkpoint-4" / "sparsity_state.json").unlink()
    with pytest.raises(StochaError, match=r"checkpoint-4 has no sparsity_state.json"):
        run(base, text, out, max_steps=8, save_steps=8)


class Poison(TrainerCallback):
    """Makes the weights infinite at a step, as a diverging run does."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 5:
            model.lm_head.weight.data.fill_(math.inf)


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run_and_the_last_good_checkpoint_stays(base, text, tmp_path, monkeypatch):
    init = StochaTrainer.__init__
    monkeypatch.setattr(
        StochaTrainer, "__init__", lambda self, *a, **k: (init(self, *a, **k), self.add_callback(Poison()))[0]
    )
    out = tmp_path / "out"
    with pytest.raises(StochaError, match=r"not finite at step 6.*checkpoint-4"):
        run(base, text, out, save_steps=2)
    assert last_checkpoint(out) == out / "checkpoint-4"
    assert AutoModelForCausalLM.from_pretrained(out / "checkpoint-4")(TOKENS).logits.isfinite().all()


@pytest.mark.slow
def test_a_full_disk_while_saving_leaves_the_checkpoint_before(base, text, tmp_path, monkeypatch):
    """A limit on the size of files stands in for the disk."""
    save, limits = StochaTrainer._save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self, *args):
        try:
            if self.state.global_step == 8:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            save(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(StochaTrainer, "_save_checkpoint", limited)
    out = tmp_path / "out"
    with pytest.raises(StochaError, match=r"checkpoint-8 could not be written.*checkpoint-4") as refusal:
        run(base, text, out)
    assert "\n" not in str(refusal.value)
    assert last_checkpoint(out) == out / "checkpoint-4" and not (out / "checkpoint-8").exists()
    assert AutoModelForCausalLM.from_pretrained(out / "checkpoint-4")(TOKENS).logits.isfinite().all()
