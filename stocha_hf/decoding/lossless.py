"""Lossless decoding of a model that cuts inputs: with the cuts it drafts, without them it verifies its own drafts.

The text is what the model writes without cuts, token by token; the weights are the same, in one copy. A round drafts
some tokens in steps of one, forgets their keys and values, and computes all of them at once in a step that reads the
weights once (Leviathan et al., arXiv 2211.17192). How many are drafted follows from how many were accepted so far,
and from what both kinds of steps took.

A draft looks at a part of the vocabulary only, for the head is most of what it would read: the first quarter, since
tokenizers number their tokens by frequency, and what the text has had (compare FR-Spec, arXiv 2502.14856).

transformers' assisted generation would do the same with a copy of the model as its assistant; its two loops, two
caches and calls take longer than a small model's draft saves.

    model.generate(**inputs, custom_generate=lossless, do_sample=False)
"""

from __future__ import annotations

import time
from typing import Any

import torch

from stocha_hf.decoding import step
from stocha_hf.decoding.conditions import FEW
from stocha_hf.decoding.cuts import is_cut
from stocha_hf.decoding.generation import loop_on_cpu
from stocha_hf.decoding.loop import Loop
from stocha_hf.errors import StochaError

PART = 4  # a draft looks at the first of so many parts of the vocabulary
FIRST = (2, 5)  # tokens that the first rounds draft, to see what steps of several tokens take
DECAY = 0.95  # of what earlier rounds count, a round
PATIENCE = 32  # steps after which a draft that did not pay is tried again


def lossless(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Write what a model with input cuts writes without them, drafting with them: for generate's `custom_generate`.

    Where its steps are not single calls of the kernels, as on a GPU or with hooks, it writes the same without drafts.

    Args:
        model: A converted model with input cuts.
        input_ids: int64 [1, length].
        logits_processor: As generate() made it; so are the other arguments.

    Returns:
        What generate() returns.

    Raises:
        StochaError: For a model without cuts, several sequences, sampling or beams.
    """
    if not any(is_cut(module) for module in model.modules()):
        raise StochaError(
            f"the model is a {type(model).__name__} that cuts no inputs: expected one to draft with; convert it with "
            "stocha-convert --inputs"
        )
    if generation_config.do_sample or generation_config.num_beams != 1 or len(input_ids) != 1:
        raise StochaError(
            f"lossless decoding was asked of {len(input_ids)} sequences, {generation_config.num_beams} beams and "
            f"do_sample={generation_config.do_sample}: expected one sequence, one beam and do_sample=False"
        )
    with model.cut_inputs("never"):
        loop = None if synced_gpus else loop_on_cpu(model, input_ids, generation_config, model_kwargs, _Rounds)
        if loop is None:
            return model._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **model_kwargs,
            )
        return loop.run(logits_processor, stopping_criteria, streamer)


class _Rounds(Loop):
    """The loop of a round: drafts, their verification, the tokens that stand."""

    def _generate(self, decode: Any, processors: Any, criteria: Any, streamer: Any) -> None:
        self._begin(processors, criteria, streamer)
        self.pace, self.listed = Pace(), _listed(self.plan, self.ids[0, : self.length], self.config)
        done = self._take(self.first)
        while not done:
            count = self.pace.drafts()
            done = self._round(count) if self._has_room(count + 1) and count else self._single(decode)

    def _single(self, decode: Any) -> bool:
        """A step without drafts."""
        start = time.perf_counter()
        logits = decode(self.ids[:, self.length - 1].contiguous())
        self.pace.verified(0, 0, time.perf_counter() - start)
        return self._take(logits)

    def _round(self, count: int) -> bool:
        """Draft so many tokens and verify them; return whether the text has ended."""
        self._make_room(count + 1)
        start = time.perf_counter()
        self._draft(count)
        drafted, halfway = self.ids[0, self.length : self.length + count].tolist(), time.perf_counter()
        logits = self._run(self.length - 1, count + 1, cuts=False)[0]
        self.pace.drafted(count, halfway - start)
        seconds = time.perf_counter() - halfway
        accepted, done = 0, self._take(logits[:1])
        while not done and accepted < count and self._last() == drafted[accepted]:
            accepted += 1
            done = self._take(logits[accepted : accepted + 1])
        self.rows.rewind(count - accepted)
        self.at.add_(accepted + 1)
        self.pace.verified(count, accepted, seconds)
        self._see()
        return done

    def _last(self) -> int:
        return int(self.ids[0, self.length - 1])

    def _has_room(self, tokens: int) -> bool:
        """Whether the cache takes a round's tokens, all in one buffer, so that they can be forgotten."""
        if self.rows is None or self.starts is None:
            return False
        return self.rows.prepare(tokens, bool(self.starts.any()), self.ids.shape[1] - self.length)

    def _draft(self, count: int) -> None:
        """Write drafted tokens behind the ids that stand, and forget them in the cache."""
        for i in range(count):
            logits = self._run(self.length - 1 + i, 1, cuts=True, listed=self.listed)[:, -1]
            seen = torch.full((1, self.plan.vocabulary), -torch.inf).index_copy_(1, self.listed, logits)
            self.ids[:, self.length + i] = self._processed(seen, self.length + i).argmax(-1)
        self.rows.rewind(count)

    def _run(self, first: int, tokens: int, **options: Any) -> torch.Tensor:
        """The logits [1, tokens, vocabulary] of a step of the ids from `first` on."""
        ids = self.ids[:, first : first + tokens].contiguous()
        positions = self.at + (first - self.length + 1) + torch.arange(tokens)
        found: Any = step.run(self.rows, ids, positions, self.starts, tokens, **options)  # type: ignore[arg-type]
        return found

    def _see(self) -> None:
        """Let drafts look at the last token too, which the part of the vocabulary may lack."""
        at = int(torch.searchsorted(self.listed, self._last()))
        if at == len(self.listed) or self.listed[at] != self._last():
            self.listed = torch.cat([self.listed[:at], self.ids[0, self.length - 1 : self.length], self.listed[at:]])


def _listed(plan: Any, prompt: torch.Tensor, config: Any) -> torch.Tensor:
    """The tokens that a draft looks at, rising."""
    ends = config.eos_token_id if config.eos_token_id is not None else []
    some = torch.arange(-(-plan.vocabulary // PART))
    return torch.cat([some, prompt, torch.as_tensor(ends, dtype=torch.int64).flatten()]).unique()


class Pace:
    """How many tokens to draft: as many as give the most tokens a second.

    With an acceptance a of each token, k drafts give 1 + a + ... + a^k tokens for k steps of a draft and a
    verification of k + 1 tokens, whose time is a straight line through those that were taken.
    """

    def __init__(self) -> None:
        self.accepted, self.tried = 1.8, 2.0  # an acceptance to begin with
        self.draft = [0.0, 0.0]  # steps, seconds
        self.moments = [0.0] * 5  # of verifications: 1, tokens, tokens^2, seconds, tokens * seconds
        self.rounds = self.idle = 0

    def drafts(self) -> int:
        """Return how many tokens the next round should draft."""
        if self.rounds < len(FIRST) or not self.draft[0]:
            return FIRST[min(self.rounds, 1)]
        rates = [self._tokens(k) / (k * self.draft[1] / self.draft[0] + self._seconds(k + 1)) for k in range(FEW)]
        best = max(range(FEW), key=rates.__getitem__)
        return best if best or self.idle < PATIENCE else 1

    def drafted(self, steps: int, seconds: float) -> None:
        """Count the steps of a draft."""
        self.draft = [DECAY * old + new for old, new in zip(self.draft, (steps, seconds), strict=True)]

    def verified(self, count: int, accepted: int, seconds: float) -> None:
        """Count a verification of so many drafts, of which the first `accepted` were right."""
        self.rounds += 1
        self.idle = 0 if count else self.idle + 1
        tokens = count + 1
        new = (1.0, tokens, tokens**2, seconds, tokens * seconds)
        self.moments = [DECAY * old + value for old, value in zip(self.moments, new, strict=True)]
        if count:
            self.accepted = DECAY * self.accepted + accepted
            self.tried = DECAY * self.tried + min(accepted + 1, count)

    def _tokens(self, count: int) -> float:
        share = self.accepted / self.tried
        return sum(share**i for i in range(count + 1))

    def _seconds(self, tokens: int) -> float:
        total, first, second, seconds, cross = self.moments
        spread = total * second - first * first
        slope = max(0.0, (total * cross - first * seconds) / spread) if spread > 1e-9 else 0.0
        return max((seconds - slope * first) / total, 0.0) + slope * tokens
