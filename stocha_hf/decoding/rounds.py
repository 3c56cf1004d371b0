"""The rounds of lossless decoding: drafts, their verification, the tokens that stand. What a device does of it is told
by its subclass: lossless.py for the CPU's kernels, gpu_lossless.py for a GPU's.

Where the text's last tokens stood in it before, what followed them is the draft, and takes no step (copies.py).
Otherwise a step with cuts drafts each token.

A draft ends after a token that it doubts (compare Draft & Verify, arXiv 2309.08168): most wrong drafts are doubted,
and what would be drafted behind them is lost. It looks at a part of the vocabulary only, for the head is much of what
it would read: the first eighth, since tokenizers number their tokens by frequency, and what the text has had (compare
FR-Spec, arXiv 2502.14856).
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from stocha_hf.decoding.conditions import FEW
from stocha_hf.decoding.copies import Copies
from stocha_hf.decoding.loop import Loop
from stocha_hf.decoding.pace import Pace

# A draft looks at the first of so many parts of the vocabulary. Of what Qwen2.5-Coder-0.5B writes, Python code and
# chats, 0.3% and 3.3% of tokens are neither there nor in the text before. The 16,384 tokens that 7M tokens of code
# have most often would miss 0% and 2.9%.
PART = 8
# A drafted token with a lower probability is the draft's last. With 0.6 to 0.7, Qwen2.5-Coder-0.5B with learned cuts
# to 0.30 and 0.40 of its bytes would read the least a token, over 20,463 tokens of its own greedy answers.
DOUBT = 0.6


@dataclass
class Counts:
    """What rounds did: tokens drafted by steps with cuts, accepted ones, steps without cuts, copied tokens."""

    drafted: int = 0
    accepted: int = 0
    verifications: int = 0
    copied: int = 0  # drafted by none: they stood in the text before


_counts: ContextVar[Counts | None] = ContextVar("counts", default=None)


@contextmanager
def counting() -> Iterator[Counts]:
    """Count what lossless decoding does in this context, and in no other thread."""
    counts = Counts()
    token = _counts.set(counts)
    try:
        yield counts
    finally:
        _counts.reset(token)


def _count(drafted: int, accepted: int, copied: int = 0) -> None:
    if counts := _counts.get():
        counts.drafted += drafted
        counts.accepted += accepted
        counts.verifications += 1
        counts.copied += copied


def first_tokens(model: Any) -> int:
    """Return how many tokens, the first ones, drafts look at in any case."""
    return -(-int(model.config.vocab_size) // PART)


class Rounds(Loop):
    """One call of generate(), greedy, for one sequence, in rounds, each of which verifies `most` tokens at most."""

    most = FEW
    drafts_by_steps = True  # with the model's cuts
    copies_text = True  # whether what stood in the text behind its last tokens before is drafted, where they did

    def _generate(self, decode: Any, processors: Any, criteria: Any, streamer: Any) -> None:
        self._begin(processors, criteria, streamer)
        self.pace = Pace(self.most)
        self.pace_of_copies = Pace(self.most, self.pace.times)
        self.copies = Copies([])
        self._start()
        done = self._take(self.first)
        while not done:
            copied = self._copy() if self.copies_text else []
            most = len(copied) or (min(self.pace.drafts(), self._wanted()) if self.drafts_by_steps else 0)
            count = next((count for count in range(most, -1, -1) if self._has_room(count + 1)), None)
            if count is None:
                done = self._take(decode(self.ids[:, self.length - 1].contiguous()))
                _count(0, 0)
            else:
                done = self._round(count, copied[:count])

    def _copy(self) -> list[int]:
        """A draft that takes no step, of as many tokens as pay; none where the last tokens are new."""
        self.copies.read(self.ids[0, len(self.copies.text) : self.length].tolist())
        if not self.copies.drafts(1):
            return []
        count = min(self.pace_of_copies.drafts(), self._wanted())
        if not count:
            self.pace_of_copies.passed()
        return self.copies.drafts(count)

    def _round(self, most: int, copied: list[int]) -> bool:
        """Verify what was copied, or else draft so many tokens at most and verify them; return whether the text has
        ended.
        """
        self._make_room(most + 1)
        self._see(self._last())
        pace = self.pace_of_copies if copied else self.pace
        start = time.perf_counter()
        drafted, doubted = (copied, False) if copied else self._draft(most)
        if copied:
            self.ids[0, self.length : self.length + len(copied)] = self.ids.new_tensor(copied)
        halfway = time.perf_counter()
        take, count = self._verify(drafted), len(drafted)
        seconds = time.perf_counter() - halfway
        if not copied:
            pace.drafted(count, doubted, halfway - start)
        accepted = 0
        try:
            done = take(0)
            while not done and accepted < count and self._last() == drafted[accepted]:
                accepted += 1
                done = take(accepted)
        finally:  # so the cache is right if a streamer or a criterion raises
            self._keep(accepted + 1)
        pace.verified(count, accepted, doubted, seconds)
        _count(count - len(copied), accepted, len(copied))
        return done

    def _wanted(self) -> int:
        """Drafts that can still be of use."""
        longest = self.config.max_length
        return self.most if longest is None else max(longest - self.length - 1, 0)

    def _last(self) -> int:
        return int(self.ids[0, self.length - 1])

    def _draft(self, most: int) -> tuple[list[int], bool]:
        """Return drafted tokens, which stand behind the ids where processors see them; whether the last is doubted."""
        drafted: list[int] = []
        for _ in range(most):
            token, probability = self._next(drafted)
            drafted.append(token)
            if probability < DOUBT:
                return drafted, True
        return drafted, False

    def _chosen(self, logits: torch.Tensor, listed: torch.Tensor, length: int) -> tuple[int, float]:
        """Of logits [1, tokens] of the `listed` tokens, behind so many ids: the most likely one, its probability."""
        if len(self.processors):
            seen = logits.new_full((1, self.model.config.vocab_size), -torch.inf).index_copy_(1, listed, logits)
            logits = self._processed(seen, length)[:, listed]
        place, probability = self._best(logits)
        return int(listed[place]), probability

    def _best(self, logits: torch.Tensor) -> tuple[int, float]:
        """The place of the greatest of logits [1, tokens], and its probability."""
        probability, place = logits.softmax(-1).max(-1)
        return int(place), float(probability)

    def _ends(self) -> list[int]:
        """End tokens, without those that the vocabulary lacks, such as -1 for none."""
        ends = self.config.eos_token_id
        found: list[int] = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
        return [token for token in found if 0 <= token < self.model.config.vocab_size]

    @abstractmethod
    def _start(self) -> None:
        """Prepare for drafts."""

    @abstractmethod
    def _see(self, token: int) -> None:
        """Let drafts look at a token, which the part of the vocabulary may lack."""

    @abstractmethod
    def _has_room(self, tokens: int) -> bool:
        """Whether the cache takes a round's tokens so that they can be forgotten."""

    @abstractmethod
    def _next(self, drafted: list[int]) -> tuple[int, float]:
        """The token that a step with cuts finds behind the drafted ones, and its probability."""

    @abstractmethod
    def _verify(self, drafted: list[int]) -> Callable[[int], bool]:
        """Run a step without cuts of the last token and the drafted ones; return what takes, of the i-th, the most
        likely token behind it, and tells whether the text has ended.
        """

    @abstractmethod
    def _keep(self, tokens: int) -> None:
        """Count the first of the verified tokens as those of the cache."""
