"""The first rows of the training data, which thresholds are measured on: the same ones on every rank, every time.

first_batches = FirstRows(dataset, collate, 32, device)
first_batches(8)                                 # one batch of 8 rows
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch

MOST_ROWS = 64  # that are read
MODEL_INPUTS = {"input_ids", "attention_mask", "position_ids"}


class FirstRows:
    """Gives the first rows of a data set as batches of a model's inputs.

    Args:
        dataset: the rows.
        collate: makes a batch of some of them.
        size: rows of a batch.
        device: of the batches.
    """

    def __init__(
        self, dataset: Iterable[Any], collate: Callable[[list[Any]], dict[str, Any]], size: int, device: torch.device
    ) -> None:
        self.dataset, self.collate, self.size, self.device = dataset, collate, size, device

    @functools.cached_property
    def rows(self) -> list[Any]:
        """Read once, since a stream would start over each time."""
        return list(itertools.islice(iter(self.dataset), MOST_ROWS))

    def __call__(self, count: int = MOST_ROWS) -> list[dict[str, torch.Tensor]]:
        rows = self.rows[:count]
        batches = [self.collate(rows[start : start + self.size]) for start in range(0, len(rows), self.size)]
        return [{key: batch[key].to(self.device) for key in MODEL_INPUTS & set(batch)} for batch in batches]
