"""Training as decoding will be: a prompt computed in full, and inputs cut from some position on.

In eval() mode a model with input cuts computes prompts in full and cuts decode steps only, while train() mode cuts at
every token. So the keys and values that a step attends to would differ between the two. Here there are three kinds of
rows:

- `whole`, a share of all rows, is cut nowhere and loses no label. It keeps the model without cuts, which repeats
  steps in doubt and verifies drafts, near what it was.
- `share`, of the rows that `whole` leaves, is uncut up to a random position, or up to the answer where the data has
  one (a prompt of more than FIRST tokens), and has a loss only where it is cut.
- The others are cut from their FIRST tokens on, as text is that the model goes on writing for long.

Of the rows that `whole` leaves, a share `doubts` is uncut where a step is in doubt too, with a loss there. The teacher
says later where that is (doubts.py), so a batch only tells which rows these are.

The first tokens are never cut: attention rests on them (Xiao et al., attention sinks, arXiv 2309.17453), and in
decoding they are a prompt's. A model that is trained with its first tokens cut learns to work around an error that
decoding never makes (docs/experiments/input_training.md). Padding is not cut either: learned thresholds pay for what
is read where inputs are cut, and would save on padding.

Which positions are cut is a tensor that comes with the batch, so one compiled layer serves all batches. What a row
draws is decided by its own tokens: a resumed run, another rank and a data loader's process draw the same. Of texts
that are packed into a row without padding each draws as a row of its own; position_ids tell where it begins.

    with prompts_uncut(model) as cutting:                # for the time of a run
        batch = PromptCollator(collate, 0.7, seed)(rows)
        cutting.cut_at = batch.pop(CUT_AT)               # before each forward; None cuts everywhere
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from stocha_hf.cuts_stocha import Cutting, cut_projections
from stocha_hf.errors import StochaError
from stocha_hf.training.entry import stocha_model
from stocha_hf.training.held_inputs import trains_with_cuts
from stocha_hf.training.losses import IGNORED

CUT_AT = "cut_at"  # key of a batch: bool [batch, seq], the positions whose inputs are cut
WITH_DOUBTS = "with_doubts"  # and one where `doubts` is above 0, of that shape: what is not cut where in doubt
FIRST = 4  # tokens of a row, that are never cut
LONGEST = 0.75  # of a row without an answer, that is taken for its prompt at most


@dataclass
class PromptCollator:
    """A data collator that leaves each row's first tokens uncut, and a share of the rows' prompts, without a loss.

    Args:
        collate: the collator of rows to batches with input_ids and labels [batch, seq].
        share: of the rows that `whole` leaves, 0 to 1, whose prompt is uncut.
        seed: of what rows draw.
        whole: share of all rows, 0 to 1, that is uncut to the end and has a loss.
        doubts: share of the rows that `whole` leaves, 0 to 1, that is not cut where a step is in doubt.
    """

    collate: Callable[[list[Any]], dict[str, Any]]
    share: float
    seed: int
    whole: float = 0.0
    doubts: float = 0.0

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Return the batch, with CUT_AT beside its keys and the labels that are left."""
        batch = self.collate(rows)
        labels, tokens = batch["labels"], batch["input_ids"]
        seen = batch.get("attention_mask", torch.ones_like(tokens)).bool()
        cut_at, without, doubts = (torch.zeros_like(seen) for _ in range(3))
        for text in _texts(seen, batch.get("position_ids")):
            doubts[text] = self.doubts > 0 and self._doubts(tokens[text])
            cut = self._cut_at(tokens[text], labels[text], seen[text])
            if cut is not None:
                cut_at[text] = cut & (torch.arange(len(cut)) >= FIRST)
                without[text][1:] = ~cut_at[text][:-1]  # a position's loss is that of the label after it
        found = batch | {"labels": labels.masked_fill(without, IGNORED), CUT_AT: cut_at & seen}
        return found | {WITH_DOUBTS: doubts} if self.doubts else found

    def _doubts(self, tokens: torch.Tensor) -> bool:
        """By a draw of its own: those of the cuts are as they are without."""
        return random.Random(f"doubts {zlib.crc32(tokens.numpy().tobytes(), self.seed)}").random() < self.doubts

    def _cut_at(self, tokens: torch.Tensor, labels: torch.Tensor, seen: torch.Tensor) -> torch.Tensor | None:
        """Where a text is cut, but for its first tokens; None for one that is cut nowhere and keeps its loss."""
        draw = random.Random(zlib.crc32(tokens.numpy().tobytes(), self.seed))
        if self.whole and draw.random() < self.whole:
            return None
        if draw.random() >= self.share:
            return torch.ones_like(seen)
        answer = labels != IGNORED
        if (seen & ~answer)[FIRST:].any():
            return answer
        return torch.arange(len(tokens)) >= draw.randrange(FIRST, max(int(LONGEST * int(seen.sum())), FIRST + 1))


def _texts(seen: torch.Tensor, positions: torch.Tensor | None) -> Iterator[tuple[int, slice]]:
    """Each text's row, and where it lies there: it is the row, or one of those that are packed into it."""
    count, length = seen.shape
    for row in range(count):
        begins = [] if positions is None else ((positions[row] == 0) & seen[row]).nonzero()[:, 0].tolist()
        yield from ((row, slice(*ends)) for ends in pairwise(sorted({0, *begins, length})))


def check_uncut(args: Any, model: nn.Module) -> None:
    """Raise StochaError where a run asks for what is not cut, of a patched model that cuts nothing in training."""
    uncut = next((key for key in ("uncut_prompts", "uncut_rows", "uncut_doubts") if getattr(args, key)), None)
    if uncut and not trains_with_cuts(model):
        name = stocha_model(model).name_or_path or "the model"
        raise StochaError(
            f"{uncut} is {getattr(args, uncut)} and {name} computes all inputs in full in training: expected a model "
            "that cuts them there; convert it with --inputs SHARE --inputs-train"
        )


@contextmanager
def prompts_uncut(model: nn.Module) -> Iterator[Cutting]:
    """Yield what a model's projections share, whose `cut_at` says where they cut; after it, they do everywhere."""
    cutting = next((module.cutting for module in cut_projections(model)), Cutting(0.0))
    cutting.paid_at = None  # folders' copies of before have none
    try:
        yield cutting
    finally:
        cutting.cut_at = cutting.paid_at = None
