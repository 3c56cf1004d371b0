"""Measure what evaluate() costs over a bare forward loop that only sums the loss: same model, windows and batches.

Both take turns; the figure is the median over rounds of the bare loop's time over evaluate()'s, so 1 is no cost. Each
run adds a line to the results file.

    python benchmarks/evaluate.py MODEL --data val.parquet --windows 4 --json benchmarks/results/evaluate.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from stocha_hf.data import text_windows
from stocha_hf.measurement.evaluation import BATCH, LOGIT_ROWS, evaluate
from stocha_hf.measurement.speed import in_turn, ratio
from stocha_hf.models import load_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@torch.no_grad()
def bare(model: Any, windows: torch.Tensor) -> float:
    total = 0.0
    for batch in windows.to(DEVICE).split(BATCH):
        logits = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        for part, after in zip(logits.split(LOGIT_ROWS), batch[:, 1:].flatten().split(LOGIT_ROWS), strict=True):
            total += F.cross_entropy(part.float(), after, reduction="sum").item()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--data", required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, required=True, help="a line is added to this file")
    args = parser.parse_args()
    windows = text_windows(args.data, Path(args.model), args.length, args.windows)
    model = load_model(args.model, dtype=getattr(torch, args.dtype)).eval().to(DEVICE)
    runs = {"bare": lambda: bare(model, windows), "evaluate": lambda: evaluate(model, windows)}
    seconds = in_turn(runs, args.rounds)
    pairs = [a / b for a, b in zip(seconds["bare"], seconds["evaluate"], strict=True)]
    record = {
        "model": Path(args.model).name,
        "device": DEVICE,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # of the last minute: beyond the number of cores, others were running
        "dtype": args.dtype,
        "windows": len(windows),
        "length": args.length,
        "rounds": args.rounds,
        "bare_tokens_per_second": windows.numel() / statistics.median(seconds["bare"]),
        "evaluate_tokens_per_second": windows.numel() / statistics.median(seconds["evaluate"]),
        "speed": ratio(seconds, "bare", "evaluate"),
        "quartiles": statistics.quantiles(pairs, n=4)[::2],
    }
    with args.json.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(record)


if __name__ == "__main__":
    main()
