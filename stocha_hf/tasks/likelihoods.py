"""Log-likelihoods of continuations, read in batches where they are wanted and nowhere else.

Rows are padded on the right, which changes nothing in a causal model. Continuations of one token after the same
context, such as Yes and No, share a row. Where memory does not suffice, the batch is halved.

    for batch in likelihoods(model, [(context, continuation)], longest=2048, rows=None):
        for number, (log_likelihood, is_what_the_model_says) in batch:
            ...
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from stocha_hf.errors import StochaError
from stocha_hf.measurement.fallback import predictions
from stocha_hf.models import cutting_everywhere

BATCH_TOKENS = {"cuda": 32_768, "cpu": 2_048}  # that are read at a time
Pair = tuple[list[int], list[int]]  # token ids of a context and of its continuation
Likelihood = tuple[float, bool]  # the logarithm, and whether the model would say this


@torch.no_grad()
def likelihoods(
    model: Any, pairs: Sequence[Pair], *, longest: int, rows: int | None
) -> Iterator[list[tuple[int, Likelihood]]]:
    """Yield the number of each pair and its continuation's likelihood, a batch at a time, longest rows first.

    Args:
        model: A CausalLM in eval mode.
        pairs: Contexts, which are not empty, and continuations.
        longest: Tokens of a row at most, its last ones.
        rows: Of a batch; None for as many as are usual for the device.
    """
    owners: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, (context, after) in enumerate(pairs):
        owners[tuple([*context, *after][-longest - 1 : -1])].append(i)
    queue = sorted(owners.items(), key=lambda row: len(row[0]), reverse=True)
    size = None
    while queue:
        size = size or rows or max(BATCH_TOKENS[model.device.type] // len(queue[0][0]), 1)
        batch = queue[:size]
        try:
            found = _of_batch(model, batch, pairs)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            size = len(batch) // 2
            torch.cuda.empty_cache()
            continue
        queue, size = queue[len(batch) :], None
        yield found


def _of_batch(
    model: Any, batch: Sequence[tuple[Sequence[int], list[int]]], pairs: Sequence[Pair]
) -> list[tuple[int, Likelihood]]:
    """The same of rows with the numbers of their pairs, the longest row first."""
    longest = len(batch[0][0])
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    for row, (tokens, _) in zip(ids, batch, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    wanted = [(at, len(row), i, pairs[i][1][-len(row) :]) for at, (row, owners) in enumerate(batch) for i in owners]
    first = min(length - len(after) for _, length, _, after in wanted)  # of the places whose prediction is wanted
    real = torch.arange(longest) < torch.tensor([[len(tokens)] for tokens, _ in batch])
    with cutting_everywhere(model):
        logits = predictions(model, ids.to(model.device), longest - first, real.to(model.device))
    found = []
    for at, length, _, tokens in wanted:
        after = torch.tensor(tokens, device=model.device)
        logs = logits[at, length - len(after) - first : length - first].float().log_softmax(-1)
        said = logs.gather(1, after[:, None]).sum()
        found.append(torch.stack([said, (logs.argmax(-1) == after).all().float()]))
    answers = [(likelihood, bool(greedy)) for likelihood, greedy in torch.stack(found).tolist()]
    if not all(abs(likelihood) < float("inf") for likelihood, _ in answers):
        raise StochaError(
            "a likelihood is NaN or infinite: expected whole weights, in a dtype that their numbers fit; try "
            "--dtype float32, or convert or train the model again"
        )
    return [(i, answer) for (_, _, i, _), answer in zip(wanted, answers, strict=True)]
