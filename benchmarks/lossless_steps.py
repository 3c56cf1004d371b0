"""Time the steps of lossless decoding by their parts: drafts with cuts, and verifications of 1 to 8 tokens, on a CPU.

The kernels are built with clocks, which the first thread reads between the parts of a step. Each kind of step runs
four times a round, of which the first is not counted, and kinds and folders take turns; times are medians.

    python benchmarks/lossless_steps.py qwen-cut-4 qwen-dense-4 --part 4 8 --json lossless_steps.jsonl
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lossless import PROMPTS

from stocha_hf.decoding import build, step
from stocha_hf.decoding import plan as plans
from stocha_hf.decoding.both_layouts import keep_both_layouts
from stocha_hf.decoding.cache import rows_of
from stocha_hf.decoding.rounds import PART
from stocha_hf.decoding.structs import ABOUT, GREATEST
from stocha_hf.models import load_model

NAMES = ("norms, sums, embedding", "q, k, v", "attention", "o", "ffn", "head")  # as cpp/step.h has the phases
TIMES = 4  # of a step, in a round


def steps(vocabulary: int, parts: list[int]) -> dict[str, tuple[int, dict[str, Any]]]:
    """By name: how many tokens a step has, and how it runs."""
    listed = {f"draft, 1/{part} of the head": torch.arange(-(-vocabulary // part)) for part in parts}
    drafts = {name: (1, {"cuts": True, "listed": some, "wanted": ABOUT}) for name, some in listed.items()}
    return drafts | {f"verification of {n}": (n, {"cuts": False, "wanted": GREATEST}) for n in (1, 2, 4, 8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--part", type=int, nargs="+", default=[PART], help="drafts look at 1/N of the vocabulary")
    parser.add_argument("--both-layouts", nargs="*", default=[], metavar="FOLDER", help="more folders, with copies")
    parser.add_argument("--before", type=int, default=160, help="tokens in the cache")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, required=True, help="lines are added to this file")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    torch.set_num_threads(args.threads)
    library = build.load((*build.FLAGS, "-DSTOCHA_CLOCKS"))
    clocks = (ctypes.c_double * len(NAMES)).in_dll(library, "stocha_clocks")
    step.kernels = lambda: library  # type: ignore[assignment]
    found: dict[tuple[str, str], list[list[float]]] = {}
    ready = []
    both = [f"{folder}, both layouts" for folder in args.both_layouts]
    for name, folder in [*zip(args.folders, args.folders, strict=True), *zip(both, args.both_layouts, strict=True)]:
        model = load_model(folder, dtype=getattr(torch, args.dtype)).eval()
        if name != folder:
            keep_both_layouts(model)
        text = AutoTokenizer.from_pretrained(folder)(" ".join(PROMPTS) * 8, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            cache = model(text[:, : args.before], use_cache=True, logits_to_keep=1).past_key_values
            ready.append((name, model, text, rows_of(plans.of(model), cache, 1)))
    starts = torch.zeros(1, dtype=torch.int64)
    for _ in range(args.rounds):
        for folder, model, text, rows in ready:
            for name, (count, options) in steps(model.config.vocab_size, args.part).items():
                given = (
                    text[:, args.before : args.before + count].contiguous(),
                    args.before + torch.arange(count)[None],
                )
                for number in range(TIMES):
                    clocks[:] = [0.0] * len(NAMES)
                    begun = time.perf_counter()
                    step.run(rows, *given, starts, count, **options)
                    seconds = time.perf_counter() - begun
                    rows.rewind(count)
                    if number:
                        found.setdefault((folder, name), []).append([seconds, *clocks])
    for (folder, name), lines in found.items():
        whole, *parts = (round(1e3 * statistics.median(column), 2) for column in zip(*lines, strict=True))
        record = {
            "model": Path(folder).name,
            "device": platform.processor() or platform.machine(),
            "threads": args.threads,
            "dtype": args.dtype,
            "tokens_before": args.before,
            "step": name,
            "ms": whole,
            "least": round(1e3 * min(line[0] for line in lines), 2),
            "parts": dict(zip(NAMES, parts, strict=True)),
        }
        with args.json.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record))


if __name__ == "__main__":
    main()
