"""What fits: prompts into the positions that a model has, and texts in work into a device's memory.

fitting = fitting_prompts(model, tokenizer, texts, new=512)      # their token ids
rows = rows_at_once(model, max(map(len, fitting.values())) + 512)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stocha_hf.answers.prompts import token_ids
from stocha_hf.errors import StochaError

ROWS = {"cuda": 2048, "cpu": 8}  # texts in work at most: more keep a GPU busy, a CPU's sparse kernels take so many
FILLED = 0.6  # of a GPU's free memory, by texts in work


def rows_at_once(model: Any, tokens: int) -> int:
    """How many texts of so many tokens fit: their keys and values, and a step's logits and probabilities."""
    if model.device.type != "cuda":
        return ROWS[model.device.type]
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * size * model.dtype.itemsize
    free = torch.cuda.mem_get_info(model.device)[0]
    return min(max(int(FILLED * free / (tokens * cache + 16 * config.vocab_size)), 1), ROWS["cuda"])


def fitting_prompts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    new: int,
    words: tuple[str, str, str] = ("prompt", "an answer", "--new"),
    least: int = 1,
) -> dict[str, list[int]]:
    """Return the texts behind which the model has positions for `new` tokens, with their token ids.

    Raises StochaError where there is none; `words` say there what the texts are, what follows them, and which option
    bounds it, to `least` tokens at least.
    """
    what, behind, option = words
    if not texts:
        raise StochaError(f"there is no {what}: expected at least one")
    most = getattr(model.config, "max_position_embeddings", None) or float("inf")
    found = dict(zip(texts, token_ids(tokenizer, texts), strict=True))
    fitting = {text: ids for text, ids in found.items() if len(ids) + new <= most}
    if not fitting:
        shortest = min(map(len, found.values()))
        advice = f"a smaller {option}" if shortest + least <= most else f"a shorter {what}"
        raise StochaError(
            f"the shortest {what} has {shortest} tokens, and {behind} may have {new}: expected "
            f"at most {most:g} together, which the model has positions for; give {advice}"
        )
    return fitting
