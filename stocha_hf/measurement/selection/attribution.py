"""Which neurons a token's prediction rests on, by gradients: an oracle, since it needs to know the token that follows.

Sparsing by attribution (arXiv 2406.06562) scores neuron i of a layer at a token by what leaving it out would cost,

    S_i = -g_i h_i + 0.5 |h_i| ||g||

h being the hidden vector and g the gradient of the next token's loss *at this token* with respect to it. The first
term is the first-order change (GxO), the second corrects it for the layers before being sparse already; |g_i h_i| is
SNIP's score, |h_i| plain magnitude. Each keeps the largest of every layer and token.

At one decode step nothing but the newest token's own computation is differentiated: keys and values of earlier tokens
lie in the cache. One backward pass over a window would add the losses of later tokens, which reach back through
attention. `own_token_gradients` computes what a step at a time with a detached cache would: attention that takes keys
and values without gradient, except each token's own. Then no path leads from a loss to another token, and one pass
over a window gives all its steps at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stocha_hf.errors import StochaError
from stocha_hf.measurement.blocks import blocks
from stocha_hf.measurement.selection.cuts import GivenNeurons, largest

ROWS = 2  # windows that are differentiated at a time
Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of g and h [..., M]: how much each neuron matters


def corrected(gradient: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """-g_i h_i + 0.5 |h_i| ||g|| (arXiv 2406.06562)."""
    return -gradient * hidden + 0.5 * hidden.abs() * gradient.norm(dim=-1, keepdim=True)


def gradient_output(gradient: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """-g_i h_i, the first-order rise of the loss without the neuron (GxO)."""
    return -gradient * hidden


def snip(gradient: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """|g_i h_i| (SNIP, arXiv 1810.02340)."""
    return (gradient * hidden).abs()


def own_token_gradients(
    model: Any, ids: torch.Tensor, **places: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each block: the gradient of each token's own loss with respect to its hidden vector, and that vector.

    Args:
        model: A CausalLM in eval mode, without cuts.
        ids: Token ids, int64 [rows, length]; the loss at a token is that of the token after it, and 0 at the last.
        **places: `attention_mask` and `position_ids` [rows, length], where there is padding.

    Yields:
        Float32 tensors [rows, length, M], block by block.
    """
    hidden: list[torch.Tensor] = []

    def keep(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        h = args[0]
        if not hidden:  # the first block's: nothing before it is differentiated
            h = h.detach().requires_grad_()
        hidden.append(h)
        return (h, *args[1:])

    hooks = [block.linears["down_proj"].register_forward_pre_hook(keep) for block in blocks(model)]
    try:
        with torch.enable_grad(), own_token_attention(model), _frozen(model):
            logits = model(ids, use_cache=False, **places).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            gradients = torch.autograd.grad(loss, hidden)
    finally:
        for hook in hooks:
            hook.remove()
    for gradient, h in zip(gradients, hidden, strict=True):
        yield gradient.float(), h.detach().float()


class Attribution:
    """Tells `cuts`, one a block, which `counts` neurons to keep at each token that a forward is about to read.

    It differentiates a copy of the model, so that neither cuts nor what measures them are in the way.
    """

    def __init__(self, model: Any, score: Score, cuts: list[GivenNeurons], counts: list[int]) -> None:
        self._model, self._score, self._cuts, self._counts = copy.deepcopy(model), score, cuts, counts

    def __call__(self, ids: torch.Tensor, places: dict[str, torch.Tensor]) -> None:
        """Look at token ids [rows, tokens], with attention_mask and position_ids where there is padding.

        Raises StochaError for a decode step, whose next token nobody knows.
        """
        if ids.shape[1] == 1:
            raise StochaError(
                "attribution is an oracle that knows the next token: expected whole texts, no generation"
            )
        parts: list[list[torch.Tensor]] = [[] for _ in self._cuts]
        for rows in torch.arange(len(ids), device=ids.device).split(ROWS):
            given = {name: tensor[rows] for name, tensor in places.items() if len(tensor) == len(ids)}
            found = own_token_gradients(self._model, ids[rows], **given)
            for kept, count, (gradient, hidden) in zip(parts, self._counts, found, strict=True):
                kept.append(largest(self._score(gradient, hidden), count))
        for cut, kept in zip(self._cuts, parts, strict=True):
            cut.given = torch.cat(kept)


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Inside, no parameter asks for a gradient."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_()


@contextmanager
def own_token_attention(model: Any) -> Iterator[None]:
    """Inside, gradients go through a token's own key and value, and not through those of others."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as transformers calls it: query [rows, heads, length, size], key and value of fewer heads."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.detach().transpose(2, 3) * scale
    own = (query.detach() * key).sum(-1) * scale  # each token's with itself, whose key has a gradient
    scores = scores + torch.diag_embed(own - own.detach())
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    output = weights @ value.detach()
    on_itself = weights.diagonal(dim1=-2, dim2=-1).detach()[..., None]
    output = output + on_itself * (value - value.detach())
    return output.transpose(1, 2).contiguous(), weights


NAME = "stocha_own_token"
ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, eager_mask)
