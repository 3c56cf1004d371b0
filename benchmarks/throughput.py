"""Measure tokens per second of the training recipe on this machine's GPU, or CPU with --small: one JSON line a case.

A case is an activation and a batch (rows of 1024 tokens a step). Each is a run of the recipe's own code on a
SmolLM2-135M shape with random weights and tokens, compiled layers, bf16 autocast; the figure is the median of what
training logs, without the first two logs, in which it compiles. Cases run one after another, so differences of a few
percent between them mean nothing. Two activations with a + between them take turns in one run, a phase of the schedule
and a log each, and `ratio` is the median over pairs of neighbours of the second's tokens per second to the first's.
With --distill the model is its own teacher, by logits and layers.

    python benchmarks/throughput.py --cases silu+stocha:64 silu:16 --json benchmarks/results/throughput_h200.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from gpu_records import check_gpu
from tokenizers import Tokenizer, models
from train_step import SHAPES
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stocha_hf.training.run import train

LENGTH = 1024
TOKENS = 3_300_000  # a case trains on so many, or on 100 steps
LOGS = 8


def inputs(folder: Path, shape: dict[str, int], length: int) -> tuple[Path, Path]:
    """A native model with random weights and a file of random tokens."""
    config = LlamaConfig(**shape, max_position_embeddings=8192, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({"<|end|>": 0, "word": 1}, unk_token="word"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>", pad_token="<|end|>").save_pretrained(
        folder / "model"
    )
    flat = np.random.default_rng(0).integers(0, shape["vocab_size"], 4000 * length).astype(np.int32)
    offsets = np.arange(0, len(flat) + 1, length, dtype=np.int32)
    pq.write_table(pa.table({"input_ids": pa.ListArray.from_arrays(offsets, flat)}), folder / "rows.parquet")
    return folder / "model", folder / "rows.parquet"


def measure(case: str, model: Path, rows: Path, length: int, small: bool, distill: bool) -> dict[str, Any]:
    names, batch = case.split(":")
    activations = names.split("+")
    logs = LOGS * len(activations)
    steps = logs * (3 if small else max(100, TOKENS // (int(batch) * length)) // LOGS)
    turns = [{"activation": activations[i % len(activations)], "until": (i + 1) / logs} for i in range(logs)]
    output = model.parent / case.replace(":", "-")
    options = {
        "model_name_or_path": model, "dtype": "float32", "dataset": rows, "output_dir": output, "packing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": length, "max_steps": steps,
        "schedule": turns, "per_device_train_batch_size": batch,
        "learning_rate": 1e-4, "bf16": True, "torch_compile": not small, "gradient_checkpointing": False,
        "logging_steps": steps // logs, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "dataloader_drop_last": True, "use_cpu": small,
    }  # fmt: skip
    if distill:
        options |= {"teacher": model, "distill_weight": 0.7, "distill_hidden": 1.0}
    start = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        train(options)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    speeds = [log["tokens_per_second"] for log in history if "tokens_per_second" in log]
    each = [speeds[i :: len(activations)][2:] for i in range(len(activations))]
    record = {
        "activation": names,
        "batch": int(batch),
        "distill": distill,
        "tokens_per_second": [statistics.median(speeds) for speeds in each],
        "all": each,
        "peak_memory_gb": max((log.get("peak_memory_gb", 0) for log in history), default=0),
        "seconds": round(time.monotonic() - start, 1),
        "device": "cpu" if small else torch.cuda.get_device_name(),
    }
    if len(each) == 2:
        record["ratio"] = statistics.median(second / first for first, second in zip(*each, strict=True))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["silu+stocha:64", "silu+stocha:16"])
    parser.add_argument("--distill", action="store_true", help="with a teacher of the same shape")
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU, to try the script")
    parser.add_argument("--json", type=Path, help="lines are added to this file")
    args = parser.parse_args()
    check_gpu(parser, "cpu" if args.small else "cuda")
    length = 64 if args.small else LENGTH
    with tempfile.TemporaryDirectory() as folder:
        model, rows = inputs(Path(folder), SHAPES["tiny" if args.small else "135m"], length)
        for case in args.cases:
            line = json.dumps(measure(case, model, rows, length, args.small, args.distill))
            print(line, flush=True)
            if args.json:
                with args.json.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
