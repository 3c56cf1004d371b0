"""One rank of the distributed tests: a training recipe that notes, step by step, its noise generator and the weights.

Run by tests/test_distributed.py under `accelerate launch`: distributed_probe.py NOTES_FOLDER KIND RUN..., where each
RUN is a recipe's arguments as a JSON list; they run one after the other. `launch` is `accelerate launch` with ranks
that are forked.
accelerate has no FSDP on the CPU, so for each KIND fsdp2... it is told that the gloo processes hold GPUs; all else is
the real path.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from stocha_hf.cli import train
from stocha_hf.training.trainer import StochaTrainer


def digest(*tensors: torch.Tensor) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return sha.hexdigest()


def whole(parameter: Any) -> torch.Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


class Notes(TrainerCallback):
    def __init__(self, path: str) -> None:
        self.path = path
        self.notes: dict[str, Any] = {"generators": [], "weights": [], "sharded": False, "kept_whole": []}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.notes["generators"].append(digest(torch.get_rng_state()))

    def on_substep_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.notes["kept_whole"].append(not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()))

    def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.notes["weights"].append(digest(*map(whole, model.parameters())))
        self.notes["sharded"] = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.notes["losses"] = [entry["loss"] for entry in state.log_history if "loss" in entry]
        Path(f"{self.path}-rank{args.process_index}.json").write_text(json.dumps(self.notes))


def launch() -> None:
    """Be `accelerate launch` with the options of sys.argv; its ranks are forks of this process that call main."""
    from accelerate.commands.launch import main as accelerate_launch
    from torch.distributed import run

    start = run.elastic_launch

    def forked(config: Any, entrypoint: str) -> Any:
        config.start_method = "fork"
        return start(config, lambda *command: main(*command[command.index("-m") + 2 :]))

    run.elastic_launch = forked
    accelerate_launch()


def main(folder: str, kind: str, *runs: str) -> None:
    if kind.startswith("fsdp2"):
        start = PartialState.__init__

        def as_gpus(self: Any, *args: Any, **kwargs: Any) -> None:
            start(self, *args, **kwargs)
            if self.distributed_type == DistributedType.MULTI_CPU:
                self.distributed_type = DistributedType.MULTI_GPU

        PartialState.__init__ = as_gpus
    build = StochaTrainer.__init__

    def with_notes(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.add_callback(Notes(f"{folder}/run{number}"))

    StochaTrainer.__init__ = with_notes  # type: ignore[method-assign]
    end = Accelerator.end_training
    for number, run in enumerate(runs):
        # one process group for all: a second may read the first's addresses in the launcher's store, and be refused
        Accelerator.end_training = end if number == len(runs) - 1 else lambda self: None  # type: ignore[method-assign]
        sys.argv[1:] = json.loads(run)
        train.main("probe")


if __name__ == "__main__":
    main(*sys.argv[1:])
