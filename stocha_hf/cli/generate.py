"""Sample from a model, and measure how likely and how diverse the samples are: activation noise against temperature.

example:
  stocha-generate smollm2-stocha --prompt "The history of paper begins"
  stocha-generate smollm2-stocha --prompts prompts.txt --samples 8 --p 0.7 0.9 --temperature 0.5 1 --plot curve.png

MODEL is a Hub id or folder, converted or native. "stocha" takes the most likely token at every step while the
activation is StochA: a negative gate value gives the model's SiLU with probability p, else 0. "temperature" draws
tokens from the model without noise. log-likelihood: mean of the samples' tokens under the model without noise;
distinct-n: different n-grams over all n-grams; self-BLEU: each sample's against the others of its prompt, 100 if all
are equal.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from stocha_hf.cli import (
    DTYPES,
    Parser,
    checked,
    dtype_name,
    one_of,
    path_or_id,
    probability,
    run,
    show,
    whole_number,
)
from stocha_hf.errors import StochaError
from stocha_hf.measurement.figures import VALUES, plot_generation

temperature = checked(float, lambda t: 0 < t < math.inf, "a number above 0; for 0, give --decoding greedy")
DEFAULTS = {"p": [0.9], "temperature": [1.0]}


def parser() -> Parser:
    verb = Parser("stocha-generate", __doc__)
    verb.add_argument("model", type=path_or_id, metavar="MODEL", help="Hub id or checkpoint folder")
    verb.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    verb.add_argument("--prompts", type=path_or_id, metavar="FILE", help="text file with one prompt per line")
    verb.add_argument("--chat", action="store_true", help="put each prompt into the tokenizer's chat template")
    verb.add_argument("--samples", type=whole_number(1), default=4, help="samples per prompt (default: 4)")
    verb.add_argument("--new", type=whole_number(1), default=64, help="longest sample, in tokens (default: 64)")
    verb.add_argument(
        "--decoding",
        nargs="+",
        type=one_of(VALUES),
        help=f"{', '.join(VALUES)}, or several (default: those whose values are given, else stocha)",
    )
    verb.add_argument("--p", nargs="+", type=probability, help="StochA's probabilities, each a run (default: 0.9)")
    verb.add_argument("--temperature", nargs="+", type=temperature, help="temperatures, each a run (default: 1)")
    verb.add_argument(
        "--seed", type=whole_number(0, 2**63 - 1), default=0, help="the same seed gives the same samples (default: 0)"
    )
    verb.add_argument("--dtype", type=dtype_name, default="bfloat16", help=f"{', '.join(DTYPES)} (default: bfloat16)")
    verb.add_argument("--json", action="store_true", help="print samples and figures as JSON")
    verb.add_argument(
        "--plot",
        type=path_or_id,
        metavar="FILE",
        help="plot diversity against log-likelihood, one line per way of decoding",
    )
    return verb


def main() -> None:
    run(parser(), generate)


def generate(args: argparse.Namespace) -> None:
    settings, texts = _settings(args), _prompts(args)
    _check(args)
    import torch

    from stocha_hf.measurement.provenance import circumstances, origin
    from stocha_hf.measurement.sampling import sample
    from stocha_hf.models import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, prompts = _tokens(args.model, texts, args.chat)
    model = load_model(args.model, dtype=getattr(torch, args.dtype)).eval().to(device)
    options = {key: getattr(args, key) for key in ("samples", "new", "seed")}
    figures = origin(args.model, model) | {"chat": args.chat, "dtype": args.dtype} | options | circumstances()
    figures |= {"prompts": texts, "runs": []}
    for decoding, noise in settings:
        found = {"decoding": decoding, **noise}
        found |= sample(model, tokenizer, prompts, doing=_title(found), **options, **noise).to_dict()
        figures["runs"].append(found)
    show(figures, _as_text(figures), args.json)
    if args.plot:
        plot_generation(figures, args.plot)


def _settings(args: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Each way of decoding with each of its values, as {option: value}; {} for greedy."""
    given = {name for name, key in VALUES.items() if key and getattr(args, key)}
    wanted = args.decoding or sorted(given) or ["stocha"]
    for name in given - set(wanted):
        raise StochaError(f"--{VALUES[name]} is given, but --decoding is {' '.join(wanted)}: expected {name} in it")
    settings: list[tuple[str, dict[str, Any]]] = []
    for name in dict.fromkeys(wanted):
        key = VALUES[name]
        settings += [(name, {key: value}) for value in getattr(args, key) or DEFAULTS[key]] if key else [(name, {})]
    return settings


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt or [])
    if args.prompts:
        try:
            text = Path(args.prompts).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StochaError(f"--prompts {args.prompts} cannot be read ({error}): expected a text file") from None
        if not text.strip():
            raise StochaError(f"--prompts {args.prompts} is empty: expected one prompt per line")
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts or not all(map(str.strip, prompts)):
        raise StochaError("there is no prompt, or an empty one: expected --prompt TEXT or --prompts FILE")
    return prompts


def _check(args: argparse.Namespace) -> None:
    """What no option's type can see."""
    if args.plot:
        from stocha_hf.measurement.plots import check_plot

        check_plot(args.plot)
        if args.samples < 2:
            raise StochaError("--samples is 1: expected at least 2 for --plot, which draws how they differ")
    if args.samples > 1:
        from stocha_hf.measurement.diversity import check_sacrebleu

        check_sacrebleu()


def _tokens(name: str, texts: list[str], chat: bool) -> tuple[Any, list[list[int]]]:
    """The model's tokenizer, and each prompt as token ids."""
    from stocha_hf.data import load_tokenizer
    from stocha_hf.models import load_config, tokenizer_folder

    load_config(name)
    tokenizer = load_tokenizer(tokenizer_folder(name))
    if not chat:
        return tokenizer, [tokenizer(text)["input_ids"] for text in texts]
    if not tokenizer.chat_template:
        raise StochaError(f"the tokenizer of {name} has no chat template: expected one for --chat; leave --chat out")
    messages = [[{"role": "user", "content": text}] for text in texts]
    return tokenizer, tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def _value(row: dict[str, Any]) -> str:
    value = row.get(str(VALUES[row["decoding"]]))
    return "" if value is None else f"{value:g}"


def _title(row: dict[str, Any]) -> str:
    return f"{row['decoding']} {_value(row)}".strip()


def _as_text(figures: dict[str, Any]) -> str:
    lines = []
    for row in figures["runs"]:
        for prompt, samples in zip(figures["prompts"], row["samples"], strict=True):
            lines += [f"[{_title(row)}] {prompt}", *(f"  {sample['text']!r}" for sample in samples)]
    for row in figures["runs"]:
        shares = ", ".join(f"{row[f'distinct_{n}']:.3f}" for n in (1, 2, 3))
        bleu = "" if row["self_bleu"] is None else f"; self-BLEU {row['self_bleu']:.1f}"
        likelihood = f"log-likelihood {row['log_likelihood']:.3f} a token"
        lines.append(f"{_title(row)}: {likelihood}; distinct 1-, 2-, 3-grams {shares}{bleu}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
