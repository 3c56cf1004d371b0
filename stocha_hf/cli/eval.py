"""Measure a model: what it can do (--tasks), perplexity, zeros and neurons that never fire (--data), and --answers.

example:
  stocha-eval smollm2-sparse --data text.parquet
  stocha-eval smollm2-sparse --data text.parquet --baseline HuggingFaceTB/SmolLM2-135M --plot zeros.png
  stocha-eval smollm2-sparse --data text.parquet --cett 0.1 0.2 0.4 --ppl-increase 1 --json > figures.json
  stocha-eval qwen-sparse --tasks humaneval --run-code --baseline Qwen/Qwen2.5-Coder-0.5B-Instruct --results qwen
  stocha-eval qwen-sparse --tasks bigbench:strategyqa hellaswag --limit 500 --task-data bigbench-1.0.0.tar.gz
  stocha-eval qwen-sparse --answers held-out.jsonl --windows 128 --baseline Qwen/Qwen2.5-Coder-0.5B-Instruct

MODEL is a Hub id or folder, converted or native. --baseline measures a second model too.

--data: The text is cut into consecutive windows of --length tokens, each with what the tokenizer puts before a text (a
BOS token or nothing), and each is read on its own. Inputs that a model cuts in decode steps are cut here at every
token; where it has a fallback, tokens in doubt are read again without cuts, and counted so. With a baseline: how far
MODEL's predictions are from the other's.
--cett C drops the neurons of smallest output in every layer, as many as add up to a share C of the layer's output
(CETT; ReLU^2 Wins), and measures what is left. --ppl-increase P finds the most zeros, with one C for all layers, that
raise the perplexity by at most P percent (PPL-P% sparsity; Sparsing Law); it takes a dozen passes over the text.

--answers: The answers in such rows alone, each behind its prompt, which is read in full and not cut, as in decoding.
--windows takes so many of them, and --length is where a row ends.

--tasks: humaneval, bigbench:NAME for BIG-bench's multiple choice, and the names of lm-evaluation-harness, which needs
the extra `tasks`. Scores come with their standard errors, and differences from a baseline, question by question, with
their 95% intervals. --limit N asks the first N questions of a fixed shuffle, the same of all models. humaneval runs
what the model writes, so it needs --run-code. --results keeps responses as they come: the same command continues where
it was killed.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any

from stocha_hf.cli import (
    DTYPES,
    Parser,
    checked,
    dtype_name,
    one_of,
    path_or_id,
    positive_number,
    run,
    share_below_1,
    show,
    whole_number,
)
from stocha_hf.errors import StochaError
from stocha_hf.measurement.evaluation_text import evaluation_text
from stocha_hf.measurement.figures import plot_evaluation
from stocha_hf.spec import ACTIVATIONS

task_name = checked(str.strip, bool, "the name of a task, such as humaneval or bigbench:strategyqa")
NEEDS = {  # an option that makes sense beside another one only
    "data": ("cett", "ppl_increase", "plot"),
    "tasks": ("limit", "batch_size", "run_code", "task_data", "results", "lossless"),
}


def parser() -> Parser:
    verb = Parser("stocha-eval", __doc__)
    verb.add_argument("model", type=path_or_id, metavar="MODEL", help="Hub id or checkpoint folder")
    verb.add_argument("--data", type=path_or_id, help="text: parquet, jsonl or txt file, folder or Hub data set")
    verb.add_argument(
        "--answers", type=path_or_id, metavar="DATA", help="prompts with answers, as stocha-answers writes them"
    )
    verb.add_argument(
        "--tasks",
        nargs="+",
        type=task_name,
        default=[],
        metavar="TASK",
        help="humaneval, bigbench:NAME, hellaswag, ...",
    )
    verb.add_argument(
        "--baseline", type=path_or_id, metavar="MODEL2", help="measure this one too, and compare predictions"
    )
    verb.add_argument(
        "--mode",
        type=one_of(ACTIVATIONS),
        help=f"force an activation on MODEL: {', '.join(ACTIVATIONS)} (default: its own)",
    )
    verb.add_argument(
        "--length",
        type=whole_number(2),
        default=1024,
        help="tokens per window, or of a prompt and answer (default: 1024)",
    )
    verb.add_argument(
        "--windows", type=whole_number(1), help="evenly spaced windows, or answers, to measure on (default: all)"
    )
    verb.add_argument(
        "--cett",
        nargs="+",
        type=share_below_1,
        metavar="C",
        help="also measure without the neurons of smallest output, up to these CETT",
    )
    verb.add_argument(
        "--ppl-increase", type=positive_number, metavar="P", help="find the PPL-P%% sparsity, P in percent"
    )
    verb.add_argument(
        "--limit", type=whole_number(1), metavar="N", help="ask N questions of each task, drawn once for all"
    )
    verb.add_argument("--batch-size", type=whole_number(1), metavar="N", help="texts of a task run at once")
    verb.add_argument(
        "--lossless",
        action="store_true",
        help="write MODEL's answers to tasks as it does without input cuts, one at a time, from drafts",
    )
    verb.add_argument(
        "--run-code", action="store_true", help="run the code that MODEL writes, with limits and without network"
    )
    verb.add_argument(
        "--task-data",
        type=path_or_id,
        metavar="PLACE",
        help="folder or archive with questions (else STOCHA_TASK_DATA)",
    )
    verb.add_argument(
        "--results", type=path_or_id, metavar="FOLDER", help="keep responses, questions and figures of tasks here"
    )
    verb.add_argument("--dtype", type=dtype_name, default="bfloat16", help=f"{', '.join(DTYPES)} (default: bfloat16)")
    verb.add_argument("--json", action="store_true", help="print the figures as JSON, with the weights' hash")
    verb.add_argument(
        "--plot", type=path_or_id, metavar="FILE", help="plot zeros by layer, reuse, and perplexity against zeros"
    )
    return verb


def main() -> None:
    run(parser(), evaluate)


def evaluate(args: argparse.Namespace) -> None:
    _check(args)
    import torch

    from stocha_hf.data import load_tokenizer, text_windows
    from stocha_hf.measurement import answers, evaluation
    from stocha_hf.measurement.cett import truncations
    from stocha_hf.measurement.provenance import circumstances, origin
    from stocha_hf.models import load_config, load_model, tokenizer_folder
    from stocha_hf.tasks.catalogue import load_tasks
    from stocha_hf.tasks.kept import write_figures

    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [name for name in (args.model, args.baseline) if name]
    configs = [load_config(name) for name in names]  # refuse a broken model before a long text is read
    tokenizers = [load_tokenizer(tokenizer_folder(name)) for name in names] if args.tasks else []
    tasks = [load_tasks(args.tasks, bool(tokenizer.chat_template), args.task_data) for tokenizer in tokenizers]
    reading = (tokenizer_folder(args.model), args.length, args.windows)
    windows = text_windows(args.data, *reading) if args.data else None
    pairs = answers.answer_rows(args.answers, *reading) if args.answers else None
    if windows is not None:
        for config in configs:
            evaluation.check_vocabulary(config, windows)
    models = [load_model(name, dtype=getattr(torch, args.dtype)).eval().to(device) for name in names]
    _check_mode(models[0], args.mode)
    _check_lossless(tasks, args)
    rows = [origin(name, model) for name, model in zip(names, models, strict=True)]
    figures = rows[0] | {"dtype": args.dtype} | circumstances()
    with models[0].stocha_mode(args.mode) if args.mode else nullcontext():
        if windows is not None:
            figures |= {"data": args.data, "length": args.length}
            for row, model in zip((figures, *rows[1:]), models, strict=True):
                row |= evaluation.evaluate(model, windows).to_dict()
                row |= truncations(model, windows, row["perplexity"], args.cett or [], args.ppl_increase)
            if args.baseline:
                figures |= evaluation.compare(models[0], models[1], windows).to_dict()
        if pairs is not None:
            figures["answers"] = {"data": args.answers} | answers.evaluate_answers(
                models[0], pairs, *models[1:]
            ).to_dict()
        if args.tasks:
            figures |= _tasks(models, tokenizers, tasks, rows, args)
    figures |= {"baseline": rows[1]} if args.baseline else {}
    if args.results:
        write_figures(args.results, figures)
    show(figures, evaluation_text(figures), args.json)
    if args.plot:
        plot_evaluation(figures, args.plot)


def _tasks(
    models: list[Any], tokenizers: list[Any], tasks: list[Any], rows: list[dict[str, Any]], args: argparse.Namespace
) -> dict[str, Any]:
    """What the first model's tasks say; those of a second one go into its row."""
    from stocha_hf.tasks.evaluate import CHOSEN, compare_tasks, evaluate_tasks
    from stocha_hf.tasks.kept import identity, write_questions

    options = {key: getattr(args, key) for key in ("limit", "batch_size", "run_code")}
    kept = args.results and f"{args.results}/responses.jsonl"
    results = []
    ways = ((args.mode, args.lossless), (None, False))  # the baseline's is its own
    for model, tokenizer, loaded, row, (mode, lossless) in zip(models, tokenizers, tasks, rows, ways, strict=False):
        name = identity(row["weights"] or row["revision"] or row["model"], model, mode)
        results.append(evaluate_tasks(model, tokenizer, loaded, kept=kept, name=name, lossless=lossless, **options))
        row["tasks"] = results[-1].to_dict()
        if results[-1].readings:
            row["task_bytes"] = [reading.to_dict() for reading in results[-1].readings]
    if args.results:
        write_questions(args.results, {row["model"]: found.answers for row, found in zip(rows, results, strict=True)})
    figures = {key: rows[0][key] for key in ("tasks", "task_bytes") if key in rows[0]} | {"limit": args.limit}
    figures |= {"chosen": CHOSEN} if args.limit else {}
    if args.baseline:
        figures["task_differences"] = [found.to_dict() for found in compare_tasks(*results)]
    return figures


def _check_mode(model: Any, mode: str | None) -> None:
    from stocha_hf.modeling_stocha import StochaConfig, stocha_mlps

    try:
        if mode is not None:
            StochaConfig(activation=mode, k=stocha_mlps(model)[0].k)
    except ValueError as error:
        raise StochaError(f"--mode {mode} cannot run on this model: {error}") from None


def _check_lossless(tasks: list[dict[str, Any]], args: argparse.Namespace) -> None:
    if not args.lossless:
        return
    kinds = {task.OUTPUT_TYPE for parts in tasks[0].values() for task in parts["tasks"].values()}
    if "generate_until" not in kinds:
        raise StochaError(
            f"--lossless was given and {' '.join(args.tasks)} writes no answers: expected a task that does, such as "
            "humaneval"
        )


def _check(args: argparse.Namespace) -> None:
    """What no option's type can see."""
    if not (args.data or args.answers or args.tasks):
        raise StochaError("there is nothing to measure: expected --data TEXT, --answers DATA or --tasks TASK")
    if args.windows and not (args.data or args.answers):
        raise StochaError("--windows is given without --data or --answers: expected one of them, or no --windows")
    for needed, options in NEEDS.items():
        for option in options:
            if getattr(args, option) and not getattr(args, needed):
                raise StochaError(
                    f"--{option.replace('_', '-')} is given without --{needed}: expected both or neither"
                )
    truncates = args.cett or args.ppl_increase is not None
    if truncates and args.mode and not ACTIVATIONS[args.mode].deterministic:
        raise StochaError(f"--mode is {args.mode}, which is random: expected a deterministic one for --cett")
    if args.plot:
        from stocha_hf.measurement.plots import check_plot

        check_plot(args.plot)
    if args.tasks:
        from stocha_hf.tasks.catalogue import check_names

        check_names(args.tasks, args.run_code)
    if args.results:
        from stocha_hf.tasks.kept import check_folder

        check_folder(args.results)


if __name__ == "__main__":
    main()
