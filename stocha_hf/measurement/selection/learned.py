"""Learn a threshold for each input of each projection by gradient, and fold them into the model's weights.

Allotting shares by curves (output_shares.py) cuts one input of a block at a time and adds up what that does. Here all
are cut at once, and thresholds follow the gradient of the predictions' divergence from the uncut model's, plus a price
times the bytes read (threshold_gradients.py). The price rises while more is read than was asked for.

Only what is cut has a loss, as a prompt has none in decoding: `answers` begins behind the prompt of each text, or at
a random place in a text without one. The
head and its predictions are computed there alone, for COMPARED_TOKENS tokens at a time.

No weight is trained. When it is done, each projection keeps one threshold, and the differences between its inputs
become scales that input_scales.py moves into the weights around it: the model computes what it did, up to rounding.

    cuts = learn_input_cuts(model, windows, 0.5)     # scales the model's weights
    patch(model, StochaConfig(activation="silu", inputs=cuts))
    groups = learn_groups(model, windows, 0.5)       # the thresholds alone: the model stays as it is
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from stocha_hf.cuts import InputCuts
from stocha_hf.cuts_stocha import cut_projections
from stocha_hf.errors import StochaError
from stocha_hf.measurement.blocks import blocks
from stocha_hf.measurement.evaluation import check_vocabulary
from stocha_hf.measurement.selection.threshold_gradients import Group, cutting, fold, groups_of, meet
from stocha_hf.progress import Progress
from stocha_hf.rules import is_number

STEPS, BATCH, RATE = 140, 32, 0.02  # of Adam on the logarithms of thresholds
UNCUT = 8  # where nothing says what is cut: a window's first part, of so many, is not
FIRST, LONGEST = 4, 0.75  # tokens of a text that are never cut, and the share of it that is uncut at most
STIFF = 20.0  # how much reading all bytes too many raises their price at once, beside what adds up
COMPARED_TOKENS = 512  # tokens whose predictions are compared at a time
PASS, CPU_PASS = 8192, 512  # tokens in a pass, on a GPU at most


def answers(lengths: torch.Tensor, longest: int, seed: int = 0, prompts: torch.Tensor | None = None) -> torch.Tensor:
    """Return which tokens of rows, each a whole text, are cut: those behind its prompt, or a random beginning of it.

    Args:
        lengths: Tokens of each text, int64 [rows]; what is behind them is padding.
        longest: Tokens of a row.
        seed: Of the beginnings.
        prompts: Tokens of each text's prompt, int64 [rows]; one of FIRST or fewer, which are never cut, is none.

    Returns:
        bool [rows, longest].
    """
    draws = torch.rand(len(lengths), generator=torch.Generator().manual_seed(seed))
    starts = FIRST + (draws * (LONGEST * lengths - FIRST).clamp(min=0)).long()
    if prompts is not None:
        starts = prompts.where(prompts > FIRST, starts)
    positions = torch.arange(longest)
    return (positions >= starts[:, None]) & (positions < lengths[:, None])


def learn_input_cuts(
    model: Any,
    windows: torch.Tensor,
    share: float,
    *,
    cut_at: torch.Tensor | None = None,
    steps: int = STEPS,
    batch: int = BATCH,
    **fields: Any,
) -> InputCuts:
    """Learn which inputs to cut, all layers at once; the model's weights are scaled in place.

    On a GPU a pass takes as many windows as half of the free memory holds, at most PASS tokens.

    Args:
        model: A CausalLM of a known architecture that does not cut its inputs, in eval mode.
        windows: Token ids, int64 [windows, length], of text as the model will meet it.
        share: Of the weights of all projections, that are not to be read, between 0 and 1.
        cut_at: The tokens whose inputs are cut, bool [windows, length], one or more in each window; None: all but a
            window's first eighth.
        steps: Of the optimizer.
        batch: Windows a step; at most as many as there are.
        **fields: More of InputCuts.

    Returns:
        One threshold a projection, for the model as it is now.

    Raises:
        StochaError: the model cuts already or is quantized, the share is not between 0 and 1, windows, cut_at or batch
            are not as above, a token id is beyond the vocabulary, or what the model computes is not finite.
    """
    groups = learn_groups(model, windows, share, cut_at=cut_at, steps=steps, batch=batch)
    return InputCuts(fold(groups), share=share, **fields)


def learn_groups(
    model: Any,
    windows: torch.Tensor,
    share: float,
    *,
    cut_at: torch.Tensor | None = None,
    steps: int = STEPS,
    batch: int = BATCH,
) -> list[Group]:
    """Learn a threshold for each input and change no weight; arguments and errors as of `learn_input_cuts`."""
    _check(model, share, batch)
    _check_windows(model, windows)
    if cut_at is None:
        cut_at = (torch.arange(windows.shape[1]) >= windows.shape[1] // UNCUT).expand(windows.shape)
    _check_places(cut_at, windows)
    device = next(model.parameters()).device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    order = torch.Generator().manual_seed(0)
    rows = max(_tokens_a_pass(model) // windows.shape[1], 1)

    def draw() -> list[tuple[torch.Tensor, torch.Tensor]]:
        chosen = torch.randperm(len(windows), generator=order)[:batch]
        return [(windows[part].to(device), cut_at[part].to(device)) for part in chosen.split(rows)]

    try:
        groups = groups_of(model, draw(), share)
        optimizer = torch.optim.Adam([group.logs for group in groups], lr=RATE, betas=(0.9, 0.95))
        price = 1.0
        for step in Progress(range(steps), desc="Learning thresholds", unit="step"):
            passes = draw()
            tokens = sum(int(at.sum()) for _, at in passes)
            for setting in optimizer.param_groups:
                setting["lr"] = RATE * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
            price = max(0.0, price + sum(_learn(model, groups, *one, share, price, tokens) for one in passes))
            optimizer.step()
            optimizer.zero_grad()
        meet(model, groups, draw(), share)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return groups


def _check(model: Any, share: float, batch: int) -> None:
    if cut_projections(model):
        raise StochaError("the model cuts its inputs already: expected one that does not; call stocha_hf.unpatch")
    if others := {
        type(x).__name__ for block in blocks(model) for x in block.linears.values() if type(x) is not nn.Linear
    }:
        raise StochaError(
            f"the model's projections are {', '.join(sorted(others))}: expected Linear, in full precision"
        )
    if not is_number(share) or not 0 < share < 1:
        raise StochaError(f"the share of weights not to read is {share!r}: expected a share between 0 and 1")
    if type(batch) is not int or batch < 1:
        raise StochaError(f"the batch is {batch!r}: expected a whole number of at least 1")


def _check_windows(model: Any, windows: torch.Tensor) -> None:
    if windows.ndim != 2 or windows.dtype != torch.int64:
        raise StochaError(
            f"the windows are {windows.dtype} of shape {list(windows.shape)}: expected token ids, int64 [windows, "
            "length]"
        )
    if not windows.numel():
        raise StochaError("there are no windows: expected at least one window of text to learn from")
    check_vocabulary(model.config, windows)


def _check_places(cut_at: torch.Tensor, windows: torch.Tensor) -> None:
    if cut_at.dtype != torch.bool or cut_at.shape != windows.shape:
        raise StochaError(
            f"cut_at is {cut_at.dtype} of shape {list(cut_at.shape)}: expected bool of the windows' shape, "
            f"{list(windows.shape)}"
        )
    if not cut_at.any(1).all():
        raise StochaError("cut_at has a window without a token that is cut: expected one or more in each")


def _tokens_a_pass(model: Any) -> int:
    """How many tokens' activations half of a GPU's free memory holds, at most PASS."""
    if (device := next(model.parameters()).device).type != "cuda":
        return CPU_PASS
    config = model.config
    token = config.num_hidden_layers * (60 * config.hidden_size + 10 * config.intermediate_size) * model.dtype.itemsize
    return min(PASS, torch.cuda.mem_get_info(device)[0] // token)


def _learn(
    model: Any, groups: list[Group], rows: torch.Tensor, at: torch.Tensor, share: float, price: float, tokens: int
) -> float:
    """Add the gradient of some windows of a step of so many `tokens`; return by how much they read too much."""
    with torch.no_grad():
        aims = model.base_model(rows, use_cache=False).last_hidden_state[at]
    with cutting(groups, at):
        found = model.base_model(rows, use_cache=False).last_hidden_state[at]
        read = torch.stack([group.weight * group.kept for group in groups]).sum()
    over, part = float(read.detach()) - (1 - share), len(found) / tokens
    hidden = found.detach().requires_grad_()
    loss = torch.zeros((), device=rows.device)
    for a, b in zip(hidden.split(COMPARED_TOKENS), aims.split(COMPARED_TOKENS), strict=True):
        with torch.no_grad():
            expected = predictions(model, b)
        chunk = F.kl_div(predictions(model, a), expected, reduction="sum", log_target=True)
        chunk.backward()
        loss += chunk.detach()
    if not loss.isfinite():
        raise StochaError(
            "the model's predictions are not finite on the windows: expected finite ones; check its weights"
        )
    torch.autograd.backward([found, (price + STIFF * over) * part * read], [hidden.grad / tokens, None])
    return over * part


def predictions(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logarithms of probabilities, float32 [tokens, vocabulary], of the last hidden states [tokens, hidden size]."""
    logits = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)
