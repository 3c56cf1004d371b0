"""Let a model answer prompts, as text to refit or train it on: its own kind of answers, with its chat template.

example:
  stocha-answers Qwen/Qwen2.5-Coder-0.5B-Instruct prompts.jsonl answers.jsonl
  stocha-answers smollm2-sparse HuggingFaceH4/ultrachat_200k answers.parquet --split train_sft --limit 20000 --new 384
  stocha-answers Qwen/Qwen2.5-Coder-0.5B-Instruct beginnings.jsonl answers.jsonl --finish-prompts --times 100
  then: stocha-convert Qwen/Qwen2.5-Coder-0.5B-Instruct qwen-sparse --activation relu --refit answers.jsonl

PROMPTS is a text file with one prompt per line; or a jsonl, json, csv or parquet file, or a Hub data set, with a
column `prompt` (text, or messages) or `messages`. OUT gets a row for each answer: `prompt` and `completion` with all
special tokens, as stocha-train and --refit read them. Answers are added as they are finished. If the command was
killed, run it again: it continues. No answer is written twice, and only --samples answers a prompt more than once.

With --finish-prompts you need no prompts but their beginnings, such as "Explain how". The model writes each on, inside
the user's turn of its chat template, --times times, and then answers it. A request ends where the model ends its turn,
or with its first paragraph or block of code; where a beginning leaves a block open, with a docstring. The requests lie
beside OUT, in a file named .requests.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from stocha_hf.cli import (
    DTYPES,
    Parser,
    checked,
    dtype_name,
    number_from_0,
    path_or_id,
    run,
    show,
    whole_number,
)
from stocha_hf.errors import StochaError

FINISHING = {"times": "times", "new": "prompt_new", "temperature": "prompt_temperature", "ends": "prompt_ends"}
top_p = checked(float, lambda share: 0 < share <= 1, "a share above 0, at most 1")


def parser() -> Parser:
    verb = Parser("stocha-answers", __doc__)
    verb.add_argument("model", type=path_or_id, metavar="MODEL", help="Hub id or checkpoint folder")
    verb.add_argument("prompts", type=path_or_id, metavar="PROMPTS", help="file, folder or Hub data set")
    verb.add_argument("output", type=path_or_id, metavar="OUT", help=".jsonl or .parquet file")
    verb.add_argument("--split", default="train", help="split of a Hub data set (default: train)")
    verb.add_argument("--column", help="column of prompts (default: prompt, else messages)")
    verb.add_argument("--plain", action="store_true", help="continue prompts as they are, without the chat template")
    verb.add_argument("--limit", type=whole_number(1), metavar="N", help="answer the first N prompts (default: all)")
    verb.add_argument(
        "--samples", type=whole_number(1), default=1, help="answers per prompt; a file can get more later (default: 1)"
    )
    verb.add_argument(
        "--finish-prompts",
        action="store_true",
        help="PROMPTS are beginnings of requests, which the model writes on before it answers them",
    )
    verb.add_argument("--times", type=whole_number(1), metavar="N", help="requests per beginning (default: 1)")
    verb.add_argument(
        "--prompt-new",
        type=whole_number(1),
        metavar="N",
        help="tokens that a beginning is written on by, at most; a request that has not ended then is dropped "
        "(default: 256)",
    )
    verb.add_argument(
        "--prompt-temperature", type=number_from_0, metavar="T", help="that requests are drawn at (default: 0.8)"
    )
    verb.add_argument(
        "--prompt-ends",
        metavar="REGEX",
        help="a request ends with the first match of this (default: with a docstring in a block of code that the "
        "beginning leaves open, else with the first paragraph or block)",
    )
    verb.add_argument("--new", type=whole_number(1), default=512, help="longest answer, in tokens (default: 512)")
    verb.add_argument(
        "--temperature", type=number_from_0, default=0.8, help="0 takes the most likely token (default: 0.8)"
    )
    verb.add_argument(
        "--top-p",
        type=top_p,
        default=1.0,
        help="draw from the most likely tokens that add up to this probability (default: 1)",
    )
    verb.add_argument(
        "--seed",
        type=whole_number(0, 2**63 - 1),
        default=0,
        help="decides what is drawn for a prompt, the same in any batch, up to rounding (default: 0)",
    )
    verb.add_argument(
        "--batch-size", type=whole_number(1), metavar="N", help="answers generated at once (default: by device)"
    )
    verb.add_argument("--dtype", type=dtype_name, default="bfloat16", help=f"{', '.join(DTYPES)} (default: bfloat16)")
    verb.add_argument("--json", action="store_true", help="print the figures as JSON")
    return verb


def main() -> None:
    run(parser(), answers)


def answers(args: argparse.Namespace) -> None:
    from stocha_hf.answers.answer_file import check_output

    how = {field: getattr(args, option) for field, option in FINISHING.items() if getattr(args, option) is not None}
    if how and not args.finish_prompts:
        option = FINISHING[next(iter(how))].replace("_", "-")
        raise StochaError(
            f"--{option} is given without --finish-prompts: expected both; add --finish-prompts, or leave this out"
        )
    if args.finish_prompts and args.plain:
        raise StochaError(
            "--finish-prompts is given with --plain: expected one of them, as a model ends its requests by the chat "
            "template"
        )
    check_output(args.output)
    import torch

    from stocha_hf.answers.finishing import Finishing
    from stocha_hf.answers.prompts import open_turns, read_prompts, rendered
    from stocha_hf.answers.writing import write_answers
    from stocha_hf.data import load_tokenizer
    from stocha_hf.measurement.provenance import circumstances, origin
    from stocha_hf.models import load_config, load_model, tokenizer_folder

    finish = Finishing(**how) if args.finish_prompts else None
    load_config(args.model)
    tokenizer = load_tokenizer(tokenizer_folder(args.model))
    prompts = read_prompts(args.prompts, split=args.split, column=args.column)[: args.limit]
    texts: Sequence[Any] = prompts
    if finish:
        open_turns(tokenizer, prompts)  # which refuses some
    else:
        texts = rendered(tokenizer, prompts, chat=not args.plain)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(args.model, dtype=getattr(torch, args.dtype)).eval().to(device)
    source: dict[str, Any] = origin(args.model, model)
    settings = {"weights": source["weights"] or source["revision"] or args.model, "dtype": args.dtype}
    options = {key: getattr(args, key) for key in ("new", "samples", "temperature", "top_p", "batch_size", "seed")}
    written = write_answers(model, tokenizer, texts, args.output, settings=settings, finish=finish, **options)
    figures = {key: value for key, value in written.to_dict().items() if value is not None}
    text = (
        f"{written.path}: {written.answers} answers, {written.new} of them new, with {written.new_tokens} tokens; "
        f"{written.tokens_per_second:,.0f} tokens a second; {written.finished:.0%} ended by themselves"
        + (f"; {written.requests} requests, and {written.unfinished} that did not end" if finish else "")
        + (f"; {written.too_long} prompts are too long" if written.too_long else "")
    )
    show(source | figures | circumstances(), text, args.json)


if __name__ == "__main__":
    main()
