"""Time lossless decoding against the same model's dense decoding: its cuts draft, and it verifies without them.

FOLDER is a converted folder with input cuts, in any number of bits. Each prompt is continued greedily in three ways
in turn: without cuts, with them, and losslessly; a ratio is taken within each prompt. `--dense` names a folder of the
same model without cuts, whose matrices may lie in another order, as a fourth way.

    python benchmarks/lossless.py qwen-cut-4 --new 128 --json lossless.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from stocha_hf import lossless
from stocha_hf.decoding import lossless as rounds
from stocha_hf.models import load_model

PROMPTS = (
    "Write a Python function that merges two sorted lists, and explain how it works.",
    "Explain what a hash table is and when to use one.",
    "Write a class for a bank account with deposits, withdrawals and a history, with tests.",
    "What is the difference between a process and a thread?",
)


class Counted(rounds.Pace):
    """A Pace that also counts: drafted and accepted tokens of each verification and its seconds, and drafts'."""

    counts: ClassVar[list[tuple[int, int, float]]] = []
    drafts_taken: ClassVar[list[tuple[int, float]]] = []

    def drafted(self, steps: int, seconds: float) -> None:
        Counted.drafts_taken.append((steps, seconds))
        super().drafted(steps, seconds)

    def verified(self, count: int, accepted: int, seconds: float) -> None:
        Counted.counts.append((count, accepted, seconds))
        super().verified(count, accepted, seconds)

    @staticmethod
    def steps_ms() -> dict[str, float]:
        """Milliseconds of a draft's step, and of verifications by their number of tokens."""
        found: dict[str, list[float]] = {"draft": [seconds / steps for steps, seconds in Counted.drafts_taken]}
        for count, _, seconds in Counted.counts:
            found.setdefault(f"verification of {count + 1}", []).append(seconds)
        return {name: 1e3 * statistics.median(times) for name, times in sorted(found.items()) if times}


def seconds_a_token(model: Any, ids: torch.Tensor, new: int, now: Callable[[], float], **options: Any) -> Any:
    """Seconds of a token after the first, and the text; transformers hands a custom_generate no streamer to ask."""
    times = [now()]
    for count in (1, 1, new):  # the first time a step may be planned anew
        text = model.generate(ids, max_new_tokens=count, do_sample=False, **options)
        times.append(now())
    return ((times[3] - times[2]) - (times[2] - times[1])) / (new - 1), text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a converted folder with input cuts")
    parser.add_argument("--dense", help="a folder of the same model to compare with")
    parser.add_argument("--new", type=int, default=128, help="tokens to write")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="the first so many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu", action="store_true", help="time one thread by its CPU time: on a machine with others")
    parser.add_argument("--json", type=Path, required=True, help="a line is added to this file")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    args.threads = 1 if args.cpu else args.threads
    now = time.process_time if args.cpu else time.perf_counter
    torch.set_num_threads(args.threads)
    rounds.Pace = Counted  # type: ignore[misc]
    model = load_model(args.folder, dtype=torch.bfloat16).eval()
    dense = load_model(args.dense, dtype=torch.bfloat16).eval() if args.dense else None
    for some in (model, dense):
        if some is not None:
            some.generation_config.eos_token_id = None  # all texts are of one length
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    seconds: dict[str, list[float]] = {}
    same, texts = True, 0
    for prompt in [PROMPTS[0], *PROMPTS[: args.prompts] * args.rounds]:
        chat = [{"role": "user", "content": prompt}]
        ids = torch.tensor([tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)])
        new = args.new if texts else 8  # the first text is not counted: it lays out weights
        took: dict[str, float] = {}
        with model.cut_inputs("never"):
            took["without cuts"], text = seconds_a_token(model, ids, new, now)
        took["with cuts"], _ = seconds_a_token(model, ids, new, now)
        took["lossless"], found = seconds_a_token(model, ids, new, now, custom_generate=lossless)
        if dense is not None:
            took["dense folder"], _ = seconds_a_token(dense, ids, new, now)
        texts += 1
        if texts == 1:
            Counted.counts.clear()
            Counted.drafts_taken.clear()
            continue
        same &= torch.equal(found, text)
        for name, value in took.items():
            seconds.setdefault(name, []).append(value)
        print({name: round(1e3 * value, 1) for name, value in took.items()}, flush=True)
    drafted, accepted, _ = (sum(column) for column in zip(*Counted.counts, strict=True))
    record = {
        "model": Path(args.folder).name,
        "share": model.config.stocha["inputs"].get("share"),
        "threads": args.threads,
        "clock": "of the process" if args.cpu else "wall",
        "new_tokens": args.new,
        "ms": {name: 1e3 * statistics.median(found) for name, found in seconds.items()},
        "speedup": {
            name: statistics.median(a / b for a, b in zip(seconds[name], seconds["lossless"], strict=True))
            for name in seconds
            if name != "lossless"
        },
        "steps_ms": Counted.steps_ms(),
        "same_text": same,
        "drafted": drafted,
        "accepted": accepted,
        "verifications": len(Counted.counts),
        "processor": platform.processor() or platform.machine(),
    }
    with args.json.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
