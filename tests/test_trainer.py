"""StochaTrainer as a library class: it leaves arguments and models as they came, and trains a model again alike."""

from __future__ import annotations

import copy
import pickle
import shutil
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import tiny_model, tiny_tokenizer

from stocha_hf.errors import StochaError
from stocha_hf.measurement.sparsity import SparsityMeter
from stocha_hf.modeling_stocha import StochaConfig, stocha_mlps
from stocha_hf.patching import patch
from stocha_hf.training.arguments import StochaArguments
from stocha_hf.training.schedule import Schedule
from stocha_hf.training.trainer import StochaTrainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
TOKENS = torch.tensor([[1, 5, 9, 17, 33, 4, 8, 60]])
ROWS = Dataset.from_list([{"input_ids": [1, *range(4, 12)]}] * 16)
PHASES = Schedule.parse("[{activation: stocha, p: 0.5, until: 0.5}, {activation: relu, until: 1.0}]")


def patched() -> Any:
    model = tiny_model()
    patch(model, StochaConfig())
    return model


def arguments(tmp_path: Any, **changes: Any) -> StochaArguments:
    options = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return StochaArguments(**options | changes)


def trainer(model: Any, args: StochaArguments, schedule: Schedule = PHASES, **kwargs: Any) -> StochaTrainer:
    rows = {"train_dataset": ROWS, "eval_dataset": ROWS.select(range(4)), "processing_class": tiny_tokenizer()}
    return StochaTrainer(model, args, schedule=schedule, **rows, **kwargs)


@pytest.mark.parametrize("key", ["uncut_prompts", "uncut_rows", "uncut_doubts"])
def test_what_is_not_cut_is_refused_for_a_model_that_cuts_nothing(key: str, tmp_path: Any) -> None:
    with pytest.raises(StochaError, match=rf"^{key} is 0\.5 and the model computes all inputs in full in training: "):
        trainer(patched(), arguments(tmp_path, **{key: 0.5}), teacher=tiny_model())
    named = patched()
    named.name_or_path = "org/model"
    with pytest.raises(StochaError, match=rf"^{key} is 0\.5 and org/model computes"):
        trainer(named, arguments(tmp_path, **{key: 0.5}))


def additions(model: Any) -> list[tuple[str, str]]:
    """What stands on a model's modules beside parameters, children and plain values: hooks, forwards, counters."""
    found = []
    for name, module in model.named_modules():
        found += [(name, key) for key in ("forward", "_original_forward", "head_is_open") if key in vars(module)]
        hooks = [key for key, value in vars(module).items() if key.endswith("hooks") and value]
        counters = [key for key, value in vars(module).items() if isinstance(value, tuple)]
        found += [(name, key) for key in hooks + counters]
    return found


def weights(model: Any) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


OPTIONS = {
    "plain": {},
    "bf16": {"bf16": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "steered and taught": {"target_sparsity": 0.9, "distill_hidden": 1.0},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_run_leaves_arguments_and_model_as_they_came_and_a_second_one_trains_alike(case, tmp_path):
    taught = patched() if "taught" in case else None
    args = arguments(tmp_path, **OPTIONS[case] | ({"teacher": "itself"} if taught else {}))
    given = args.to_dict()
    before = additions(patched())
    ends, limit = [], torch._dynamo.config.recompile_limit
    for _ in range(2):
        model = patched()
        run = trainer(model, args, teacher=taught)
        assert additions(model) == before  # nothing before training
        run.train()
        assert args.to_dict() == given and torch._dynamo.config.recompile_limit == limit
        assert additions(model) == before and (taught is None or additions(taught) == before)
        ends.append(weights(model))
    assert all(map(torch.equal, *ends)) and not torch.equal(ends[0][0], weights(patched())[0])


def test_the_same_model_trained_and_evaluated_again_gathers_nothing_and_can_be_copied_and_pickled(tmp_path):
    model = patched()
    before = additions(model)
    run = trainer(model, arguments(tmp_path, bf16=True))
    run.train()
    measured = run.evaluate()["eval_loss"]
    assert additions(model) == before
    again, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    model.eval()
    expected = model(TOKENS).logits
    assert torch.equal(pickled.eval()(TOKENS).logits, expected)
    again.lm_head.weight.data.zero_()
    assert again.eval()(TOKENS).logits.abs().max() == 0  # its own forward, not the first one's
    after = weights(model)
    run.train()
    assert run.evaluate()["eval_loss"] < measured and not all(map(torch.equal, weights(model), after))
    trainer(model, arguments(tmp_path)).train()
    assert additions(model) == before


def test_a_run_that_fails_takes_everything_off_the_model_too(tmp_path):
    model = patched()
    run = trainer(model, arguments(tmp_path, target_sparsity=0.5, torch_compile=True, torch_compile_backend="eager"))
    model.lm_head.weight.data.fill_(float("inf"))
    with pytest.raises(StochaError, match="not finite"):
        run.train()
    assert additions(model) == additions(patched())


def test_a_sparsity_target_rests_before_relu_and_may_begin_with_a_resumed_run(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    ends = {}
    for name, target in {"none": None, "late": 0.9, "whole": 0.9}.items():
        out = tmp_path / name
        if name == "late":
            shutil.copytree(tmp_path / "none" / "checkpoint-2", out / "checkpoint-2")
        model = patched()
        run = trainer(model, arguments(tmp_path, output_dir=str(out), target_sparsity=target, **options))
        run.train(resume_from_checkpoint=str(out / "checkpoint-2") if name == "late" else None)
        steered = [log["step"] for log in run.state.log_history if "l1_coefficient" in log]
        assert steered == ([] if target is None else [3, 4])
        ends[name] = weights(model)
    assert all(map(torch.equal, ends["late"], ends["whole"]))  # no penalty before ReLU
    assert not all(map(torch.equal, ends["none"], ends["whole"]))


def test_evaluation_while_training_runs_what_the_checkpoint_will_infer_with(tmp_path):
    model, seen = patched(), []
    run = trainer(model, arguments(tmp_path, eval_strategy="steps", eval_steps=1))
    loop = run.evaluation_loop
    run.evaluation_loop = lambda *a, **k: (
        seen.append((stocha_mlps(model)[0].inference, model.config.stocha["inference"])),
        loop(*a, **k),
    )[1]
    run.train()
    assert seen == [("silu", "silu"), ("relu", "relu")]
    told = [row["eval_num_tokens"] for row in run.state.log_history if "eval_loss" in row]
    assert told == [row["num_tokens"] for row in run.state.log_history if "loss" in row] == [18, 36]


def test_a_resumed_run_counts_the_tokens_between_the_last_log_and_the_checkpoint(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    logs = {}
    for name in ("whole", "resumed"):
        out = tmp_path / name
        if name == "resumed":
            shutil.copytree(tmp_path / "whole" / "checkpoint-2", out / "checkpoint-2")
        run = trainer(patched(), arguments(tmp_path, output_dir=str(out), **options))
        run.train(resume_from_checkpoint=str(out / "checkpoint-2") if name == "resumed" else None)
        logs[name] = [(row["step"], row["num_tokens"], row["loss"]) for row in run.state.log_history if "loss" in row]
    assert logs["resumed"] == logs["whole"]
    assert [row[:2] for row in logs["whole"]] == [(2, 36), (3, 54), (4, 72)], "each checkpoint ends a row"


def test_two_meters_of_a_model_count_separately():
    model = patched()
    first, second = SparsityMeter(model), SparsityMeter(model)
    with first.record():
        model(TOKENS)
        with second.record(), model.stocha_mode("relu"):
            model(TOKENS)
    both, relu = first.read(), second.read()
    assert 0 < both["mean"] < relu["mean"] and both["mean"] == pytest.approx(relu["mean"] / 2)
    first.close()
    with second.record(), model.stocha_mode("relu"):
        model(TOKENS)
    assert second.read() == relu
    second.close()
    second.close()
    assert additions(model) == additions(patched())


def test_the_best_checkpoint_is_restored_with_its_thresholds(tmp_path):
    """With weights that stay, so that the thresholds alone tell checkpoints apart; the largest loss counts as best."""
    model = patched()
    schedule = Schedule.parse("[{activation: fatrelu, sparsity: [0.55, 0.95], until: 1.0}]")
    options = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1, "max_steps": 3}
    args = arguments(tmp_path, load_best_model_at_end=True, learning_rate=0.0, greater_is_better=True, **options)
    run = trainer(model, args, schedule)
    run.train()
    best = type(model).from_pretrained(run.state.best_model_checkpoint)
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
    last = type(model).from_pretrained(tmp_path / "out" / "checkpoint-3")
    assert last.config.stocha["threshold"] != best.config.stocha["threshold"] == model.config.stocha["threshold"]
    assert torch.equal(model.eval()(TOKENS).logits, best.eval()(TOKENS).logits)
