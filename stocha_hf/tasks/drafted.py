"""Continue prompts losslessly, one at a time: a model's input cuts draft, and what the text repeats; it checks its
drafts without the cuts.

What it costs is counted with each answer: the tokens that were drafted and copied, and the steps without cuts.

    for i, tokens, counts in draft_answers(model, prompts, new=256, ends={2}, stop=None):
        print(tokenizer.decode(tokens), counts.drafted, counts.verifications)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from stocha_hf.decoding.lossless import lossless
from stocha_hf.decoding.rounds import PART, Counts, counting
from stocha_hf.measurement.records import BytesRead, Drafts

UNUSED = 0  # a padding token, which generate() asks for; one text has none


@contextmanager
def _defaults(model: Any) -> Iterator[None]:
    """Hide the model's own generation config, whose repetition penalty, say, generate() would add to the one given."""
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


class _Stop(StoppingCriteria):
    """Ends a text where `stop` is true of the tokens behind its prompt."""

    def __init__(self, stop: Callable[[list[int]], bool], prompt: int) -> None:
        self.stop, self.prompt = stop, prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = self.stop(input_ids[0, self.prompt :].tolist())
        return torch.tensor([done], device=input_ids.device)


@torch.no_grad()
def draft_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    new: int,
    ends: Collection[int],
    stop: Callable[[list[int]], bool] | None,
) -> Iterator[tuple[int, list[int], Counts]]:
    """Continue each prompt greedily until it ends, as the model does without cuts.

    Args:
        model: A CausalLM in eval mode.
        prompts: Token ids of each, at least one.
        new: Tokens of a continuation at most.
        ends: Token ids that end one; it keeps them.
        stop: Called with a text's new tokens so far; true ends it.

    Yields:
        The number of a prompt, its continuation's token ids, and what was drafted and checked for them.
    """
    config = GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=UNUSED
    )
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt], device=model.device)
        criteria = StoppingCriteriaList([] if stop is None else [_Stop(stop, len(prompt))])
        with _defaults(model), counting() as counts:
            text = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                custom_generate=lossless,
                stopping_criteria=criteria,
            )
        tokens = text[0, len(prompt) :].tolist()
        if not counts.verifications:  # no drafts: a step a token after the first, which is the prompt's
            counts = replace(counts, verifications=len(tokens) - 1)
        yield i, tokens, counts


def with_drafts(read: BytesRead, steps: int, counts: Counts) -> tuple[BytesRead, Drafts]:
    """Return what a token took on average where a step reads `read`, with cuts if there are any, and its drafts.

    A draft looks at a part of the vocabulary, so it reads that part of lm_head. A step without cuts reads all: an
    upper bound where the FFN is sparse by its gate.

    Args:
        read: Bytes of a step.
        steps: Tokens of all texts after the first of each, which is its prompt's.
        counts: Over all texts.
    """
    drafts, checks = (count / max(steps, 1) for count in (counts.drafted, counts.verifications))
    blocks = round(drafts * read.blocks + checks * read.dense_blocks)
    head = round((drafts / PART + checks) * read.lm_head)
    whole = BytesRead(blocks + head, blocks, head, read.dense_blocks, blocks / read.dense_blocks)
    return whole, Drafts(steps, counts.drafted, counts.accepted, counts.verifications, read.share, counts.copied)
