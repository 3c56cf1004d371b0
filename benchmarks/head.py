"""Count the rows of lm_head that a greedy step computes exactly where the head is in two planes, and time the step.

Text is read token by token, each one by a step that wants all logits and by one that wants the greatest. The record
says how often both choose the same token, how many rows the second one computed, and the median time of each.

    python benchmarks/head.py FOLDER --data DATA --json benchmarks/results/head.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from stocha_hf.data import text_windows
from stocha_hf.decoding import plan as plans
from stocha_hf.decoding import step
from stocha_hf.decoding.cache import rows_of
from stocha_hf.decoding.structs import ALL, GREATEST
from stocha_hf.models import load_model

PROMPT = 8  # tokens of a window that are read at once


@torch.inference_mode()
def compared(model: Any, window: torch.Tensor) -> list[tuple[bool, int, float, float]]:
    """For each later token of a window: whether both steps choose the same, rows computed, seconds of each."""
    cache = model(window[None, :PROMPT], use_cache=True, logits_to_keep=1).past_key_values
    plan, found = plans.of(model), []
    if plan is None or (rows := rows_of(plan, cache, 1)) is None:
        raise SystemExit("the model has no whole steps")
    for i in range(PROMPT, len(window)):
        given = (window[i : i + 1][None].contiguous(), torch.tensor([[i]]), torch.zeros(1, dtype=torch.int64), 1)
        logits, seconds = {}, {}
        for wanted in (ALL, GREATEST):
            start = time.perf_counter()
            logits[wanted] = step.run(rows, *given, wanted=wanted)[0, 0]  # type: ignore[index]
            seconds[wanted] = time.perf_counter() - start
            rows.rewind(1)
        rows.advance(1)
        same = bool(logits[ALL].argmax() == logits[GREATEST].argmax())
        found.append((same, int(logits[GREATEST].isfinite().sum()), seconds[ALL], seconds[GREATEST]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--json", type=Path, required=True, help="a line is added to this file")
    args = parser.parse_args()
    model = load_model(str(args.folder), dtype=torch.bfloat16).eval()
    windows = text_windows(args.data, args.folder, args.length, args.windows)
    same, rows, every, greatest = zip(*[one for window in windows for one in compared(model, window)], strict=True)
    record = {
        "model": args.folder.name,
        "data": Path(args.data).name,
        "tokens": len(same),
        "same_token": sum(same) / len(same),
        "rows": model.config.vocab_size,
        "rows_computed": {"mean": statistics.fmean(rows), "median": statistics.median(rows), "most": max(rows)},
        "ms": {"all": 1e3 * statistics.median(every), "greatest": 1e3 * statistics.median(greatest)},
        "threads": torch.get_num_threads(),
    }
    with args.json.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
