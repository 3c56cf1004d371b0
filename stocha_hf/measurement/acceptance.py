"""Acceptance: how often a model's greedy token is the one that another model wrote, greedily, at that place.

A draft is worth what its tokens are: where the draft of speculative decoding chooses the same token as the model that
verifies, the step that would have read all weights is saved. The text is the original's own, and each token is given
the true ones before it, as the verified text of speculative decoding gives them.

    text = greedy_text(model, prompts, new_tokens=128, pad=tokenizer.pad_token_id or 0)
    with selection.applied(model, prompt=text.prompt):
        acceptance(model, text)  # 0.94
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from stocha_hf.errors import StochaError
from stocha_hf.measurement.fallback import predictions

ROWS = 64  # texts at a time on a GPU
CPU_ROWS = 8


@dataclass(frozen=True)
class GreedyText:
    """What a model wrote: token ids [texts, prompt + new], int64, padded before each prompt and after each end.

    `mask` [texts, prompt + new] is 1 at tokens and 0 at padding; the tokens from `prompt` on are the model's.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    prompt: int

    @property
    def judged(self) -> int:
        """How many tokens acceptance is measured on: all that a decode step wrote."""
        return int(self.mask[:, self.prompt + 1 :].sum())


@torch.no_grad()
def greedy_text(model: Any, prompts: list[list[int]], new_tokens: int, pad: int = 0) -> GreedyText:
    """Let a model continue prompts greedily.

    Args:
        model: A CausalLM in eval mode.
        prompts: Token ids of each prompt.
        new_tokens: How many tokens to write at most; a text ends before at the model's end token.
        pad: The token to pad with.

    Raises:
        StochaError: a prompt is empty, or there is none.
    """
    if not prompts or not all(prompts):
        raise StochaError("there is no prompt, or an empty one: expected at least one token in each")
    longest = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    parts = []
    for ids, real in zip(*(tensor.to(model.device).split(_rows(model)) for tensor in (tokens, mask)), strict=True):
        options: dict[str, Any] = {"do_sample": False, "pad_token_id": pad, "num_beams": 1, "repetition_penalty": 1.0}
        found = model.generate(ids, attention_mask=real, max_new_tokens=new_tokens, **options)
        parts.append(torch.nn.functional.pad(found, (0, longest + new_tokens - found.shape[1]), value=pad).cpu())
    whole = torch.cat(parts)
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends if isinstance(ends, list) else [ends])
    written = whole[:, longest:]
    ended = torch.isin(written, ends).cumsum(1) - torch.isin(written, ends).long()  # before each token
    return GreedyText(whole, torch.cat([mask, (ended == 0).long()], 1), longest)


@torch.no_grad()
def acceptance(model: Any, text: GreedyText) -> float:
    """Measure how often a model chooses the text's own token, where decode steps would choose it.

    Args:
        model: A CausalLM of the vocabulary of the one that wrote, with whatever cuts it is to have.
        text: What the original wrote.

    Returns:
        A share of the tokens after each text's first written one, which comes from reading the prompt.
    """
    same = 0
    for ids, mask in zip(*(tensor.split(_rows(model)) for tensor in (text.tokens, text.mask)), strict=True):
        places = (mask.cumsum(1) - 1).clamp_min(0)
        given = {"attention_mask": mask, "position_ids": places}
        given = {name: tensor[:, :-1].to(model.device) for name, tensor in given.items()}
        kept = ids.shape[1] - 1 - text.prompt
        real = given["attention_mask"] == 1
        found = predictions(model, ids[:, :-1].to(model.device), kept, real, **given).argmax(-1)
        right = found.cpu() == ids[:, text.prompt + 1 :]
        same += int((right & mask[:, text.prompt + 1 :].bool()).sum())
    return same / text.judged


def _rows(model: Any) -> int:
    return ROWS if model.device.type == "cuda" else CPU_ROWS
