"""What a model is worth: perplexity and zeros of the FFN's hidden vectors, in one pass over fixed windows of tokens.

windows = text_windows("val.parquet", Path(folder), length=1024)
evaluate(load_model(folder).eval(), windows)  # {"perplexity": 12.4, "tokens": 437248, "sparsity": {...}}
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from stocha_hf.sparsity import SparsityMeter

BATCH = 4  # windows at a time


@torch.no_grad()
def evaluate(model: Any, windows: torch.Tensor) -> dict[str, Any]:
    """Figures of a patched model, in the mode and dtype that it is in, on token ids [windows, length].

    `perplexity` is exp of the mean loss of all tokens but each window's first, which has nothing before it; `tokens`
    counts the windows' tokens; `sparsity` {mean, per_layer} is the share of exact zeros in the hidden vectors.
    """
    device = next(model.parameters()).device
    meter = SparsityMeter(model)
    total = 0.0
    with meter.record():
        for batch in tqdm(windows.split(BATCH), desc="Evaluating", unit="batch", disable=None, leave=False):
            tokens = batch.to(device)
            logits = model(tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
            total += F.cross_entropy(logits.float(), tokens[:, 1:].flatten(), reduction="sum").item()
    meter.close()
    predicted = windows.numel() - len(windows)
    return {"perplexity": math.exp(total / predicted), "tokens": windows.numel(), "sparsity": meter.read()}
