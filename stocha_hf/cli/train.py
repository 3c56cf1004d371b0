"""The two training recipes: YAML and command line in, a checkpoint folder out.

recipes/continued_pretrain.py and recipes/relu_finetune.py call `main` under `accelerate launch`. Everything is checked
before training starts. Started again with the same command, a run goes on from its last whole checkpoint.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stocha_hf.checkpoint import RANDOM_START
from stocha_hf.errors import StochaError
from stocha_hf.provenance import public_name

LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class DataArguments:
    """Where the text comes from; see stocha_hf/data.py."""

    dataset: str | None = field(default=None, metadata={"help": "Hub data set, local file or folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_text_column: str = field(default="text", metadata={"help": "Name of the text column."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Stream a Hub data set; needs max_steps."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Data for eval_strategy: a data set or file."})
    eval_split: str = field(default="validation", metadata={"help": "Split of eval_dataset."})


def main(prog: str, schedule: list[dict[str, Any]] | None = None) -> None:
    """Parse, check, train, save. `schedule` is what a recipe runs if its YAML gives none."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        train(*parse(sys.argv[1:], schedule))
    except StochaError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{prog}: {error}", file=sys.stderr)
        sys.exit(2)


def parse(argv: list[str], schedule: list[dict[str, Any]] | None) -> tuple[Any, Any, Any, Any]:
    """(DataArguments, StochaArguments, trl's ModelConfig, Schedule) of a command line. Raises StochaError."""
    from trl import ModelConfig, TrlParser

    from stocha_hf.fresh import check_start
    from stocha_hf.schedule import Schedule
    from stocha_hf.training_arguments import StochaArguments

    try:
        kinds: Any = (DataArguments, StochaArguments, ModelConfig)
        data, args, model = TrlParser(kinds).parse_args_and_config(args=argv)
    except (ValueError, OSError) as error:
        raise StochaError(str(error).splitlines()[0]) from None
    check_start(model.model_name_or_path, args.model_config, args.tokenizer_name_or_path, model.use_peft)
    if data.dataset is None:
        raise StochaError("dataset is missing: expected it in the YAML file or as --dataset")
    phases = args.schedule or schedule
    if phases is None:
        raise StochaError("schedule is missing: expected a list of phases {activation, p, anneal, until}")
    if data.dataset_streaming and args.max_steps <= 0:
        raise StochaError("dataset_streaming is true without max_steps: expected the number of steps")
    return data, args, model, Schedule.parse(phases)


def train(data: Any, args: Any, model_args: Any, schedule: Any) -> None:
    """Train and leave a checkpoint in args.output_dir; with LoRA the adapter, and the merged model in merged/."""
    from transformers import AutoTokenizer
    from trl import get_peft_config

    from stocha_hf.fresh import fresh_model
    from stocha_hf.hidden_states import check_same_shape
    from stocha_hf.loading import load_model
    from stocha_hf.loss import check_teacher
    from stocha_hf.training import StochaTrainer, last_checkpoint

    name, revision = model_args.model_name_or_path, model_args.model_revision
    options = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    train_data, eval_data = _load_both(data)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name_or_path or name, revision=revision)
    if args.model_config is not None:
        model = fresh_model(args.model_config, tokenizer, seed=args.seed, **options)
    else:
        model = load_model(name, revision=revision, **options)
    teacher = load_model(args.teacher, **options) if args.teacher else None
    if teacher is not None:
        check_teacher(model.config, teacher.config)
        if args.distill_hidden:
            check_same_shape(model.config, teacher.config)
        _use_base(teacher)
    if model_args.use_peft:
        _check_thresholds_stay(args, schedule)
        _check_adapter_base(model.config.stocha, schedule, name)
        model_args.lora_target_modules = model_args.lora_target_modules or LORA_MODULES
    _record_history(model.config, data, args, model_args, schedule)
    trainer = StochaTrainer(
        model=model,
        args=args,
        schedule=schedule,
        teacher=teacher,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    checkpoint = last_checkpoint(args.output_dir)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if args.threshold_shift:
        trainer.shift_thresholds()
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()
    if model_args.use_peft and trainer.accelerator.is_main_process:
        merge_adapter(args.output_dir, name, revision, tokenizer, trainer.model.config.stocha)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # without it gloo's threads may outlive Python, and abort a run that is done


def _load_both(data: DataArguments) -> tuple[Any, Any]:
    from stocha_hf.data import load_data

    shared = {"config": data.dataset_config, "text_column": data.dataset_text_column}
    train_data = load_data(
        str(data.dataset),
        split=data.dataset_split,
        streaming=data.dataset_streaming,
        **shared,  # type: ignore[arg-type]
    )
    if data.eval_dataset is None:
        return train_data, None
    return train_data, load_data(data.eval_dataset, split=data.eval_split, **shared)  # type: ignore[arg-type]


def _use_base(teacher: Any) -> None:
    """The teacher is the source model: whatever its checkpoint infers with, it runs its own activation."""
    from stocha_hf.modeling_stocha import stocha_mlps

    for mlp in stocha_mlps(teacher):
        mlp.forced = teacher.config.stocha["base"]


def _check_adapter_base(stocha: dict[str, Any], schedule: Any, name: str) -> None:
    """An adapter's users load the base as it is, so its inference must be what the adapter ends with."""
    last = schedule.phases[-1].activation
    if stocha["inference"] != last:
        raise StochaError(
            f"{name} infers with {stocha['inference']} but its adapter would be trained for {last}: expected a base "
            f"that infers with {last}; run stocha-convert {name} NEW_BASE --activation {last} and train on NEW_BASE"
        )


def _check_thresholds_stay(args: Any, schedule: Any) -> None:
    """An adapter has no place for thresholds."""
    if args.threshold_shift or any(phase.sparsity is not None for phase in schedule.phases):
        raise StochaError(
            "use_peft is true with thresholds that training moves, which an adapter cannot hold: expected a schedule "
            "without sparsity and no threshold_shift, or use_peft: false"
        )


def _record_history(config: Any, data: Any, args: Any, model_args: Any, schedule: Any) -> None:
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    stage = {
        "start": None if args.model_config is None else RANDOM_START,
        "dataset": public_name(data.dataset),
        "steps": args.max_steps if args.max_steps > 0 else None,
        "epochs": args.num_train_epochs if args.max_steps <= 0 else None,
        "tokens_per_step": rows * args.max_length if args.max_length else None,
        "seed": args.seed,
        "schedule": schedule.to_list(),
        "learning_rate": args.learning_rate,
        "method": "lora" if model_args.use_peft else "full",
        "teacher": args.teacher and public_name(args.teacher),
        "distill_weight": args.distill_weight if args.teacher else None,
        "distill_hidden": args.distill_hidden or None,
        "target_sparsity": args.target_sparsity,
    }
    stage = {key: value for key, value in stage.items() if value is not None}
    config.stocha = config.stocha | {"history": [*(config.stocha.get("history") or []), stage]}


def merge_adapter(adapter: str, base: str, revision: str | None, tokenizer: Any, stocha: dict[str, Any]) -> None:
    """Write the full model of an adapter and its base to adapter/merged: an ordinary checkpoint with that config
    entry.
    """
    from peft import PeftModel

    from stocha_hf import report
    from stocha_hf.loading import load_model

    folder = Path(adapter) / "merged"
    merged = PeftModel.from_pretrained(load_model(base, revision=revision, dtype="auto"), adapter).merge_and_unload()
    merged.config.stocha = stocha
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = report.model_card(merged.config.to_dict(), report.source_metadata(Path(base)))
    (folder / "README.md").write_text(card, encoding="utf-8")
