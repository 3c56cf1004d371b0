"""A training run: a recipe's keys in, a checkpoint folder out.

`train` is the package's function, `parse` and `run` its two halves; the command is stocha_hf/cli/train.py. Everything
is checked before training starts. Started again with the same command, a run goes on from its last whole checkpoint.

    train("recipes/smollm2-135m/relu_finetune.yaml", max_steps=100, output_dir="out")
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.paths import local_path
from stocha_hf.checkpoints.quantized import refuse_quantized
from stocha_hf.checkpoints.staging import check_place
from stocha_hf.errors import StochaError


@dataclass
class DataArguments:
    """Where the text comes from; see stocha_hf/data/rows.py."""

    dataset: str | None = field(default=None, metadata={"help": "Hub data set, local file or folder."})
    datasets: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Several in place of dataset, each with its share of rows: {name: share}."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_text_column: str = field(default="text", metadata={"help": "Name of the text column."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Stream a Hub data set; needs max_steps."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Data for eval_strategy: a data set or file."})
    eval_split: str = field(default="validation", metadata={"help": "Split of eval_dataset."})


@dataclass
class TrainingResult:
    """What a run leaves.

    Attributes:
        folder: the checkpoint, or the adapter, whose merged model is in `folder / "merged"`.
        steps: optimizer steps done, with those before a resumed start.
        loss: the last logged training loss, a mean over tokens; None where nothing was logged.
        sparsity: the last measured share of zeros in the FFN's hidden vectors, a mean over layers; or None.
        tokens: trained on from the start to the last log, by all ranks.
        seconds: of this start, without loading.
    """

    folder: Path
    steps: int
    loss: float | None
    sparsity: float | None
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return dataclasses.asdict(self) | {"folder": str(self.folder)}


def train(config: dict[str, Any] | str | Path, **overrides: Any) -> TrainingResult:
    """Train a model as a recipe says, and leave a checkpoint in its output_dir.

    Args:
        config: a recipe: the path of a YAML file, or its keys and values.
        **overrides: keys that win over the recipe's, as in `schedule=[{"activation": "relu", "until": 1.0}]`.

    Returns:
        A TrainingResult.

    Raises:
        StochaError: for a recipe that cannot be run, before anything is written; when the loss is not finite or a
            checkpoint cannot be written.
    """
    from stocha_hf.training.recipe import read_file

    keys = read_file(str(config)) if isinstance(config, str | Path) else config
    return run(*parse([], None, keys | overrides))


def parse(
    argv: list[str], schedule: list[dict[str, Any]] | None, config: dict[str, Any] | None = None
) -> tuple[Any, Any, Any, Any]:
    """(DataArguments, StochaArguments, trl's ModelConfig, Schedule) of a command line, or of a recipe's keys.

    `schedule` is what runs if neither gives one. Raises StochaError.
    """
    from trl import ModelConfig

    from stocha_hf.training.arguments import StochaArguments
    from stocha_hf.training.fresh import check_start
    from stocha_hf.training.recipe import read_recipe
    from stocha_hf.training.schedule import Schedule

    data, args, model = read_recipe((DataArguments, StochaArguments, ModelConfig), argv, config)
    check_start(model.model_name_or_path, args.model_config, args.tokenizer_name_or_path, model.use_peft)
    if data.dataset is None and data.datasets is None:
        raise StochaError("dataset is missing: expected it in the YAML file or as --dataset")
    if data.datasets is not None and (data.dataset is not None or not isinstance(data.datasets, dict)):
        raise StochaError(
            f"datasets is {data.datasets!r} and dataset {data.dataset!r}: expected one of the two; datasets is a "
            "mapping in the recipe, of each data set to its share of the rows"
        )
    phases = args.schedule or schedule
    if phases is None:
        raise StochaError("schedule is missing: expected a list of phases {activation, p, anneal, until}")
    if data.dataset_streaming and args.max_steps <= 0:
        raise StochaError("dataset_streaming is true without max_steps: expected the number of steps")
    return data, args, model, Schedule.parse(phases)


def run(data: Any, args: Any, model_args: Any, schedule: Any) -> TrainingResult:
    """Train and leave a checkpoint in args.output_dir; with LoRA the adapter, and the merged model in merged/."""
    from stocha_hf.data import load_tokenizer
    from stocha_hf.data.files import local_files
    from stocha_hf.models import load_config, tokenizer_folder
    from stocha_hf.training.adapters import LORA_MODULES, check_adapter, merge_adapter
    from stocha_hf.training.checkpointing import last_checkpoint
    from stocha_hf.training.history import record_run

    name, revision = model_args.model_name_or_path, model_args.model_revision
    _check_output(args.output_dir, name, args.teacher)
    for text in filter(None, (data.dataset, *(data.datasets or ()), data.eval_dataset)):
        local_files(text)  # what is missing here is told before the Hub is asked
    if args.model_config is None:
        load_config(name, revision)  # a missing model or teacher is told before long texts are read
    teacher_config = load_config(args.teacher) if args.teacher else None
    train_data, eval_data = _load_both(data, args.seed)
    tokenizer = load_tokenizer(tokenizer_folder(args.tokenizer_name_or_path or name, revision))
    model = _student(args, model_args, tokenizer)
    teacher = None if teacher_config is None else _teacher(args, model_args, model.config, teacher_config)
    if model_args.use_peft:
        check_adapter(args, schedule, model.config.stocha, name)
        model_args.lora_target_modules = model_args.lora_target_modules or [*LORA_MODULES]
    record_run(model, data, args, model_args, schedule)
    trainer = _trainer(
        model_args,
        model=model,
        args=args,
        schedule=schedule,
        teacher=teacher,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
    )
    checkpoint = last_checkpoint(args.output_dir)
    trained = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if args.threshold_shift:
        trainer.shift_thresholds()
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()
    if model_args.use_peft and trainer.accelerator.is_main_process:
        merge_adapter(args.output_dir, name, revision, tokenizer, trainer.model.config.stocha)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # without it gloo's threads may outlive Python, and abort a run that is done
    return _result(Path(args.output_dir), trainer.state, trained.metrics["train_runtime"])


def _student(args: Any, model_args: Any, tokenizer: Any) -> Any:
    """The model to train, patched."""
    from stocha_hf.models import load_model
    from stocha_hf.training.fresh import fresh_model

    name = model_args.model_name_or_path
    try:
        if args.model_config is not None:
            model = fresh_model(args.model_config, tokenizer, seed=args.seed, **_options(model_args))
        else:
            model = load_model(name, revision=model_args.model_revision, **_options(model_args))
            refuse_quantized(model.config.to_dict(), name, "training")
    except (ValueError, ImportError) as error:
        if model_args.attn_implementation is None or isinstance(error, StochaError):
            raise
        raise StochaError(str(error).partition("\n")[0]) from error  # it is not known, or not installed
    return model


def _teacher(args: Any, model_args: Any, student_config: Any, config: Any) -> Any:
    """The teacher, with its own activation whatever its checkpoint infers with: it stands for the source model."""
    from stocha_hf.modeling_stocha import stocha_mlps
    from stocha_hf.models import load_model
    from stocha_hf.training.hidden_error import check_same_shape
    from stocha_hf.training.losses import check_teacher

    check_teacher(student_config, config)
    if args.distill_hidden:
        check_same_shape(student_config, config)
    taught_in = {"dtype": args.loads_teacher_in} if args.loads_teacher_in else {}
    teacher = load_model(args.teacher, **_options(model_args) | taught_in)
    for mlp in stocha_mlps(teacher):
        mlp.forced = teacher.config.stocha["base"]
    return teacher


def _options(model_args: Any) -> dict[str, Any]:
    return {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}


def _trainer(model_args: Any, **kwargs: Any) -> Any:
    from trl import get_peft_config

    from stocha_hf.training.trainer import StochaTrainer

    try:
        return StochaTrainer(**kwargs, peft_config=get_peft_config(model_args))
    except (ValueError, ImportError, RuntimeError) as error:  # keys that trl, transformers or peft refuse together
        raise StochaError(str(error).partition("\n")[0]) from error


def _result(folder: Path, state: Any, seconds: float) -> TrainingResult:
    last = {key: value for entry in state.log_history for key, value in entry.items()}
    return TrainingResult(
        folder, state.global_step, last.get("loss"), last.get("sparsity"), last.get("num_tokens", 0), seconds
    )


def _check_output(output: str, *models: str | None) -> None:
    check_place(Path(output))
    for name in filter(None, models):
        if os.path.exists(output) and os.path.realpath(output) == os.path.realpath(local_path(name)):
            raise StochaError(
                f"output_dir is {output}, a model that the run reads and would write over: expected another folder"
            )


def _load_both(data: DataArguments, seed: int) -> tuple[Any, Any]:
    from stocha_hf.data import load_data, load_mixture

    shared = {"config": data.dataset_config, "text_column": data.dataset_text_column}
    of_training: Any = shared | {"split": data.dataset_split, "streaming": data.dataset_streaming}
    if isinstance(data.datasets, dict):
        train_data = load_mixture(data.datasets, seed, **of_training)
    else:
        train_data = load_data(str(data.dataset), **of_training)
    if data.eval_dataset is None:
        return train_data, None
    return train_data, load_data(data.eval_dataset, split=data.eval_split, **shared)  # type: ignore[arg-type]
