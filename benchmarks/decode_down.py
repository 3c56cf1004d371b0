"""Time dense decode steps with down_proj a row an input and a row an output, as shares of the memory's read speed.

A SiLU Llama of random weights in both layouts; a greedy step of each and reading alone take turns, on a CPU. A share
is taken within each round: bytes of weights that the step reads a second, over what reading alone gave.

    python benchmarks/decode_down.py --random 1b --bits 4 --json decode_down.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decode_llama_cpp import random_model, step_bytes

from stocha_hf.decoding import plan as plans
from stocha_hf.decoding import step
from stocha_hf.decoding.cache import rows_of
from stocha_hf.decoding.structs import GREATEST
from stocha_hf.measurement.speed import READ, in_turn, read_memory
from stocha_hf.measurement.speed_models import SHAPES

LAYOUTS = {"down_proj a row an input": ("down_proj",), "a row an output": ()}
BEFORE = 8  # tokens in the cache


def one_step(rows: Any) -> None:
    ids, positions = torch.tensor([[5]]), torch.tensor([[BEFORE]])
    step.run(rows, ids, positions, torch.zeros(1, dtype=torch.int64), 1, wanted=GREATEST)
    rows.rewind(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", choices=sorted(SHAPES), default="1b", help="a shape of random weights")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, required=True, help="lines are added to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    read, ready, kept = {}, {"reading": read_memory()}, []
    for name, transposed in LAYOUTS.items():
        model = random_model(args.random, args.bits, 8, "silu", transposed)
        with torch.inference_mode():
            cache = model(torch.randint(0, 1000, (1, BEFORE)), use_cache=True, logits_to_keep=1).past_key_values
        rows = rows_of(plans.of(model), cache, 1)
        kept.append((model, cache))
        ready[name], read[name] = partial(one_step, rows), step_bytes(model, 0.0)
    seconds = in_turn(ready, args.rounds)
    for name, size in read.items():
        speeds = [size / time / 1e9 for time in seconds[name]]
        record = {
            "model": f"random Llama {args.random}, SiLU",
            "bits": args.bits,
            "layout": name,
            "device": platform.processor() or platform.machine(),
            "threads": args.threads,
            "tokens_before": BEFORE,
            "ms": round(1e3 * statistics.median(seconds[name]), 2),
            "least": round(1e3 * min(seconds[name]), 2),
            "bytes": size,
            "gb_s": round(statistics.median(speeds), 1),
            "reading_gb_s": round(statistics.median(READ / time / 1e9 for time in seconds["reading"]), 1),
            "share": round(
                statistics.median(a * b / READ * 1e9 for a, b in zip(speeds, seconds["reading"], strict=True)), 3
            ),
        }
        with args.json.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record))


if __name__ == "__main__":
    main()
