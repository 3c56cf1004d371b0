"""The words that a distillation step compares the models over, where a recipe takes some of a large vocabulary.

- The most frequent words of the training text are in every step.
- So are a batch's own words, up to half of the others that are taken: what its text goes on with has most of the
  teacher's probability, also where it is rare.
- Of all others some are drawn, uniformly and without replacement, and each stands for others / drawn of them: the
  logarithm of that is added to its logit, the student's and the teacher's. So the softmax's sum over these words is on
  average that over all words, and the KL an estimate of that over all words; with all others drawn it is that KL.

A draw follows from the seed, the step and the batch: a resumed run draws what the whole one drew. There are as many
words in every step, so nothing is compiled twice, and nothing waits for the GPU. losses.py takes their logits.

    words = SomeWords(counts, 32768, seed=0)     # counts: how often each word of the vocabulary occurs
    training_losses(model, teacher, inputs, kl_weight=1.0, words=words.of_step(step, inputs["labels"]))
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from torch import nn

from stocha_hf.errors import StochaError
from stocha_hf.training.heads import causal_lm

COUNTED = 2_000_000  # tokens of the first rows of the training data
OTHERS = 4  # there is one other word, of the batch or drawn, for so many frequent ones


class Words(NamedTuple):
    """What the losses of one batch are over.

    Attributes:
        ids: int64 [words], each word once.
        offsets: float32 [words], to add to logits after softcap and temperature; 0 where a word is itself alone.
        places: int64 [vocabulary], where a word that is itself alone is in ids; -100 for all others.
    """

    ids: torch.Tensor
    offsets: torch.Tensor
    places: torch.Tensor


class SomeWords:
    """Chooses the words of each batch.

    Args:
        counts: int64 [vocabulary], how often each word occurs; of equally frequent ones the first counts as more so.
        frequent: how many of the most frequent words are in every step, less than the vocabulary.
        seed: of the draws.
    """

    def __init__(self, counts: torch.Tensor, frequent: int, seed: int) -> None:
        self.seed, device = seed, counts.device
        order = counts.sort(descending=True, stable=True).indices
        self.frequent, self.others = order[:frequent], order[frequent:]
        self.nowhere = len(self.others)  # the place of frequent words, behind the end of the others
        self.places = torch.full((len(counts),), self.nowhere, device=device)
        self.places[self.others] = torch.arange(self.nowhere, device=device)
        self.taken = min(max(frequent // OTHERS, 1), self.nowhere)
        self.share = (counts[self.frequent].sum() / counts.sum().clamp(min=1)).item()  # of the tokens counted

    def of_step(self, step: int, labels: torch.Tensor) -> Words:
        """The words of a step for a batch with these labels, int64 of any shape, -100 where there is none.

        Of a batch with more own words than half of what is taken, some are left to the draw.
        """
        device, labels = self.others.device, labels.to(self.others.device)
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{self.seed} {step}".encode()))
        turns = torch.rand(2, self.nowhere + 1, generator=generator, device=device)
        turns[0, self.places[labels.clamp(min=0)].where(labels >= 0, self.nowhere)] -= 1.0  # the batch's come first
        wanted, at = turns[0, :-1].sort(stable=True)
        room = self.taken // 2
        turns[1, at[:room]] -= (wanted[:room] < 0) * 1.0
        wanted, at = turns[1, :-1].sort(stable=True)
        own, other = wanted[: self.taken] < 0, self.others[at[: self.taken]]
        count = own.sum()
        weight = (self.nowhere - count) / (self.taken - count)
        offsets = torch.zeros(len(self.frequent) + self.taken, device=device)
        offsets[len(self.frequent) :] = weight.log().where(~own, 0.0)
        ids = torch.cat([self.frequent, other])
        places = torch.full_like(self.places, -100)
        places[ids] = torch.arange(len(ids), device=device).where(offsets == 0, -100)
        return Words(ids, offsets, places)


def some_words(
    rows: Iterable[dict[str, Any]], frequent: int, vocabulary: int, seed: int, accelerator: Any
) -> SomeWords:
    """The words of the text that these rows begin with; one rank counts them for all, and says what it found."""
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    if accelerator.is_main_process:
        counts = count_words(rows, vocabulary)
    counts = broadcast(counts.to(accelerator.device))
    words = SomeWords(counts, frequent, seed)
    if accelerator.is_main_process:
        print(
            f"the {frequent} most frequent words are {words.share:.2%} of the first {counts.sum()} tokens; with them "
            f"each step takes {words.taken} of the {words.nowhere} others",
            flush=True,
        )
    return words


class HeadPart(NamedTuple):
    """The rows of an nn.Linear head that make the logits of some words; gradients flow to the head's parameters."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight, self.bias)


def head_part(head: Any, words: Words) -> HeadPart:
    """The part of a head for these words. Inside the head's call sharded parameters are whole."""
    rows = [None if whole is None else whole.index_select(0, words.ids) for whole in (head.weight, head.bias)]
    return HeadPart(*rows)  # type: ignore[arg-type]  # a weight is not None


def count_words(rows: Iterable[dict[str, Any]], vocabulary: int, most: int = COUNTED) -> torch.Tensor:
    """How often each word occurs in the first `most` tokens of these rows' input_ids, int64 [vocabulary]."""
    tokens = islice(chain.from_iterable(row["input_ids"] for row in rows), most)
    return torch.bincount(torch.tensor([*tokens], dtype=torch.int64), minlength=vocabulary)


def check_some_words(frequent: int, *models: Any) -> None:
    """Raise StochaError where the KL of these models cannot be taken over so many of the words."""
    for model in map(causal_lm, models):
        vocabulary, head = model.config.get_text_config().vocab_size, model.get_output_embeddings()
        if frequent >= vocabulary:
            raise StochaError(
                f"distill_vocabulary is {frequent} and the vocabulary has {vocabulary} words: expected fewer, or no "
                "such key for all words"
            )
        if type(head) is not nn.Linear:
            package = type(head).__module__.partition(".")[0]
            raise StochaError(
                f"distill_vocabulary is {frequent} and the lm_head is {package}'s {type(head).__name__}, whose "
                "logits are not taken word by word: expected torch's Linear without an adapter, or no such "
                "key for all words"
            )
