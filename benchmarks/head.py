"""Count the rows of lm_head that a greedy step computes exactly where the head is in two planes, and time the step.

Text is read token by token, each one by a step that wants all logits and by one that wants the greatest. The record
says how often both choose the same token, how many rows the second one computed, and the median time of each. With
--below both also tell whether the token's probability is below that: how often the same, and how often the second one
had to compute all rows.

    python benchmarks/head.py FOLDER --data DATA --json benchmarks/results/head.jsonl
    python benchmarks/head.py FOLDER --data DATA --below 0.7 --json benchmarks/results/head.jsonl
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
def compared(
    model: Any, window: torch.Tensor, below: float | None
) -> list[tuple[bool, int, float, float, bool, bool]]:
    """For each later token of a window: whether both steps choose the same, rows computed, seconds of each; whether
    the first one doubts the token, and the second one too.
    """
    cache = model(window[None, :PROMPT], use_cache=True, logits_to_keep=1).past_key_values
    plan, found = plans.of(model), []
    if plan is None or (rows := rows_of(plan, cache, 1)) is None:
        raise SystemExit("the model has no whole steps")
    for i in range(PROMPT, len(window)):
        given = (window[i : i + 1][None].contiguous(), torch.tensor([[i]]), torch.zeros(1, dtype=torch.int64), 1)
        logits, seconds, doubts = {}, {}, {}
        for wanted in (ALL, GREATEST):
            sums = None if below is None else torch.empty(1)
            start = time.perf_counter()
            logits[wanted] = step.run(rows, *given, wanted=wanted, sums=sums, below=below or 1)[0, 0]  # type: ignore[index]
            seconds[wanted] = time.perf_counter() - start
            doubts[wanted] = sums is not None and below is not None and 1 / float(sums) < below
            rows.rewind(1)
        rows.advance(1)
        same = bool(logits[ALL].argmax() == logits[GREATEST].argmax())
        computed = int(logits[GREATEST].isfinite().sum())
        found.append((same, computed, seconds[ALL], seconds[GREATEST], doubts[ALL], doubts[GREATEST]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--below", type=float, help="a probability below which a token is in doubt")
    parser.add_argument("--json", type=Path, required=True, help="a line is added to this file")
    args = parser.parse_args()
    model = load_model(str(args.folder), dtype=torch.bfloat16).eval()
    windows = text_windows(args.data, args.folder, args.length, args.windows)
    tokens = [one for window in windows for one in compared(model, window, args.below)]
    same, rows, every, greatest, doubted, doubted_too = zip(*tokens, strict=True)
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
    if args.below is not None:
        few = [count for count in rows if count < model.config.vocab_size]
        record |= {
            "below": args.below,
            "in_doubt": statistics.fmean(doubted),
            "same_doubt": statistics.fmean(a == b for a, b in zip(doubted, doubted_too, strict=True)),
            "all_rows": 1 - len(few) / len(rows),
        }
        if few:
            record["rows_elsewhere"] = {
                "mean": statistics.fmean(few),
                "median": statistics.median(few),
                "most": max(few),
            }
    with args.json.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
