"""Train a model as a recipe says: with an activation schedule and, if wanted, a teacher, LoRA or a sparsity target.

example:
  stocha-train --config recipes/smollm2-135m/relu_finetune.yaml --use_cpu true --max_steps 20
  stocha-train --accelerate fsdp2 --num_processes 4 --config my-recipe.yaml --learning_rate 1e-4

Every key of a recipe may be given as --KEY VALUE and wins over the file. Its keys are dataset, schedule, teacher and
the others of this package (docs/guides/train.md), those of trl's SFTConfig and ModelConfig and of transformers'
TrainingArguments. Run the same command again to continue from the last complete checkpoint.

--accelerate starts the run by `accelerate launch`, on several GPUs or machines, with a config of the package (single,
cpu, ddp, fsdp2_whole, fsdp2, zero3) or a file of your own. The longer form: accelerate launch ... -m
stocha_hf.cli.train --config FILE. Without either, a run takes the first GPU, or with --use_cpu true the CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from stocha_hf.cli import Parser, run
from stocha_hf.errors import StochaError

CONFIGS = Path(__file__).parent.parent / "training" / "accelerate"


class _TrainParser(Parser):
    """What it does not know are keys of the recipe, for training.run.parse."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        known, known.keys = self.parse_known_args(*args, **kwargs)
        return known


def parser(prog: str = "stocha-train") -> Parser:
    verb = _TrainParser(prog, __doc__)
    verb.usage = "%(prog)s --config FILE [--accelerate NAME] [--KEY VALUE ...]"
    verb.add_argument("--config", metavar="FILE", help="the recipe: a YAML file of keys and values")
    verb.add_argument("--accelerate", metavar="NAME", help="launch with one of its configs, or a FILE")
    verb.add_argument("--num_processes", metavar="N", type=int, help="processes for --accelerate")
    return verb


def main(prog: str = "stocha-train", schedule: list[dict[str, Any]] | None = None) -> None:
    """Run the command; `schedule` is what runs if the recipe gives none, as a script of recipes/ may say."""
    verb = parser(prog)

    def command(args: argparse.Namespace) -> None:
        recipe = [f"--config={args.config}"] * (args.config is not None) + args.keys
        if args.accelerate is not None:
            launch(args.accelerate, args.num_processes, [sys.argv[0]] if schedule else [], recipe)
        elif args.num_processes is not None:
            raise StochaError(f"--num_processes is {args.num_processes} without --accelerate: expected both")
        train(recipe, schedule)

    run(verb, command)


def train(recipe: list[str], schedule: list[dict[str, Any]] | None) -> None:
    from stocha_hf.training.run import parse
    from stocha_hf.training.run import run as run_training

    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # in a file it is hundreds of pieces
    try:
        run_training(*parse(recipe, schedule))
    except StochaError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            sys.exit(2)  # the first process says it
        raise


def launch(name: str, processes: int | None, script: list[str], recipe: list[str]) -> None:
    """Become `accelerate launch` of this command, or of `script`, with a config of the package or a file."""
    config = CONFIGS / f"{name}.yaml"
    config = config if config.is_file() else Path(os.path.expanduser(name))
    if not config.is_file():
        known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
        raise StochaError(f"--accelerate is {name}: expected one of {known}, or a config file of accelerate")
    options = ["--config_file", str(config)]
    if processes is not None:
        if processes < 1:
            raise StochaError(f"--num_processes is {processes}: expected at least 1")
        options += ["--num_processes", str(processes)]
    if name == "single" and (visible := os.environ.get("CUDA_VISIBLE_DEVICES")):
        options += ["--gpu_ids", visible.split(",")[0]]  # accelerate would overwrite it with the config's
    target = script or ["-m", "stocha_hf.cli.train"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *target, *recipe]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
