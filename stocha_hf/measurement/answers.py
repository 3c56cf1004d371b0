"""What a model is worth on answers, measured as it decodes: a prompt read in full, the answer behind it with its cuts.

Windows of text (evaluation.py) cut inputs at every token, also those of a chat's request, which decoding computes in
full; and training may have no loss there (uncut_prompts). So runs are compared on answers that they have not seen, and
on these alone. Steps in doubt are found and computed again in two passes, as in fallback.py.

    rows = answer_rows("held-out.jsonl", Path(folder), longest=1024, most=128)
    evaluate_answers(load_model(folder).eval(), rows, baseline)  # AnswersEvaluation(perplexity=2.9, kl=0.03, ...)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from stocha_hf.data import load_data, load_tokenizer
from stocha_hf.data.row_text import pair_ids
from stocha_hf.errors import StochaError
from stocha_hf.measurement.evaluation import check_vocabulary
from stocha_hf.measurement.fallback import answer_predictions, fallback_of, read_of_texts, with_repeated
from stocha_hf.measurement.records import AnswersEvaluation
from stocha_hf.models import cutting_everywhere
from stocha_hf.progress import Progress


def answer_rows(
    name: str, tokenizer_folder: str | Path, longest: int, most: int | None = None
) -> list[tuple[list[int], int]]:
    """Read prompts and the answers behind them, as stocha-answers writes them.

    Args:
        name: As in `load_data`: rows of `prompt` and `completion`, both text.
        tokenizer_folder: Checkpoint folder with the tokenizer.
        longest: Tokens of a row, prompt and answer; an answer is cut off there.
        most: Take at most so many rows, evenly spaced.

    Returns:
        Token ids of each row, and how many of them are the prompt's.

    Raises:
        StochaError: the rows are others, no prompt leaves room for an answer, or as `load_data` and `load_tokenizer`.
    """
    data, tokenizer = load_data(name), load_tokenizer(tokenizer_folder)
    if not all(isinstance(data[0].get(key), str) for key in ("prompt", "completion")):
        raise StochaError(
            f"{name} has no prompts with answers: expected rows of prompt and completion, both text, as "
            "stocha-answers writes them"
        )
    pairs = (pair_ids(tokenizer, row["prompt"], row["completion"]) for row in data)
    rows = [((prompt + answer)[:longest], len(prompt)) for prompt, answer in pairs]
    rows = [(ids, prompt) for ids, prompt in rows if 0 < prompt < len(ids)]
    if not rows:
        raise StochaError(
            f"{name} has no prompt that leaves room for its answer within {longest} tokens: expected one; give a "
            "greater --length"
        )
    step = max(len(rows) // most, 1) if most else 1
    return rows[::step][:most]


@torch.no_grad()
def evaluate_answers(
    model: Any, rows: Sequence[tuple[list[int], int]], baseline: Any | None = None
) -> AnswersEvaluation:
    """Measure a model on answers, in the dtype that it is in.

    Args:
        model: A CausalLM in eval mode.
        rows: Of `answer_rows`.
        baseline: Another one of the same vocabulary, on the same device, to compare predictions with.

    Returns:
        Its figures, over all tokens of the answers.

    Raises:
        StochaError: a token id is beyond a vocabulary, or a prediction is not finite.
    """
    for some in filter(None, (model, baseline)):
        check_vocabulary(some.config, torch.tensor([max(max(ids) for ids, _ in rows)]))
    sums = torch.zeros(4, dtype=torch.float64)  # both losses, divergence, and tokens of the same likeliest successor
    repeated = 0
    for ids, prompt in Progress(rows, desc="Reading answers", unit="answer"):
        tokens = torch.tensor([ids], device=model.device)
        found, doubted = _log_probabilities(model, tokens, prompt)
        repeated += doubted
        answer = tokens[0, prompt:]
        sums[0] += F.nll_loss(found, answer, reduction="sum").cpu()
        if baseline is not None:
            aims, _ = _log_probabilities(baseline, tokens, prompt)
            sums[1] += F.nll_loss(aims, answer, reduction="sum").cpu()
            sums[2] += F.kl_div(found, aims, reduction="sum", log_target=True).cpu()
            sums[3] += (found.argmax(-1) == aims.argmax(-1)).sum().cpu()
    count = sum(len(ids) - prompt for ids, prompt in rows)
    loss, other, kl, same = (sums / count).tolist()
    if not all(map(math.isfinite, (loss, other, kl))):
        raise StochaError(
            f"the mean loss on the answers is {loss}, the baseline's {other}, the divergence {kl}: expected finite "
            "ones; check both models' weights"
        )
    # an answer's first token comes from its prompt, and none from its last one
    read, fallback = read_of_texts(model, [(ids[:-1], prompt + 1) for ids, prompt in rows]), None
    if fallback_of(model):
        read, fallback = with_repeated(model, read, count - len(rows), repeated)
    compared = {}
    if baseline is not None:
        compared = {"kl": kl, "top1_agreement": same, "baseline_perplexity": math.exp(other)}
    return AnswersEvaluation(len(rows), count, math.exp(loss), read, fallback, **compared)


def _log_probabilities(model: Any, tokens: torch.Tensor, prompt: int) -> tuple[torch.Tensor, int]:
    """Those of the answer's tokens, float32 [answer, vocabulary], and how many steps were in doubt."""
    with cutting_everywhere(model):
        logits, doubted = answer_predictions(model, tokens, prompt)
    return logits[0].float().log_softmax(-1), doubted
