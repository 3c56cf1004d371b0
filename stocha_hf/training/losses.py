"""The training loss: next token, mixed with KL(teacher || student) for every token where there is a teacher.

The logits of a batch, [tokens, vocabulary] in float32, are the largest tensors of a training step: 34 GB for 65,536
tokens and 128k words, for the student and again for the teacher. Here they exist for one chunk of tokens at a time,
and each chunk's gradient is taken at once, in the forward pass. So nothing is computed twice, and neither model's head
is needed again in backward, where wrappers may have taken its weights away. The price: the weight of the KL must be
known in the forward pass. Nothing waits for a GPU: shapes do not depend on which positions have a loss.

With `words` (some_words.py) both are taken over these words alone. The rows of the heads that belong to them are
selected once a batch, the student's inside the one call of its head, where wrappers have gathered its weights.

The loss runs inside the student's own forward, around one call of its lm_head (heads.py):

    open_head(model)  # before wrapping
    open_head(teacher)
    losses = training_losses(model, teacher, inputs, kl_weight=0.5)
    (losses.loss / losses.tokens).backward()

The objective with a teacher is that of Hinton et al., arXiv 1503.02531, with its factor of temperature squared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from stocha_hf.errors import StochaError
from stocha_hf.training.compiled_layers import set_forward
from stocha_hf.training.heads import call_open, causal_lm, final_hidden_states
from stocha_hf.training.some_words import Words, head_part

IGNORED = -100  # the label of a position without a loss
LOGITS_AT_ONCE = 2**28  # 1 GiB in float32


class Losses(NamedTuple):
    """Sums over `tokens` positions; only `loss` has a gradient. float32 (float64 for float64 hidden states), 0-dim."""

    loss: torch.Tensor  # (1 - kl_weight) * nll + kl_weight * kl
    nll: torch.Tensor
    kl: torch.Tensor
    tokens: torch.Tensor  # int64


def check_teacher(student_config: Any, teacher_config: Any) -> None:
    """Raises StochaError when the two models do not share a vocabulary size (configs of transformers)."""
    student, teacher = (config.get_text_config().vocab_size for config in (student_config, teacher_config))
    if student != teacher:
        raise StochaError(
            f"the teacher has a vocabulary of {teacher} tokens and the student one of {student}: distillation needs "
            "the same tokenizer for both, so name the model that the student was converted from"
        )


def training_losses(
    model: nn.Module,
    teacher: nn.Module | None,
    inputs: Mapping[str, Any],
    *,
    kl_weight: float = 0.0,
    words: Words | None = None,
    after_teacher: Callable[[torch.Tensor, nn.Module], None] | None = None,
    **options: Any,
) -> Losses:
    """The losses of one batch; `inputs` are the models' own, with `labels` [batch, seq] (-100: no loss).

    Both models went through open_head. `model` may be wrapped since (DDP, FSDP, peft, torch.compile); the
    teacher is a whole copy on every rank, or None, and then kl is 0. `after_teacher` is called with the teacher's
    states [batch, seq, hidden] after the final norm and its head, before the model runs. `options` are those of
    chunked_losses.
    """
    teacher_hidden = teacher_head = None
    if teacher is not None:
        with torch.no_grad():
            teacher_hidden = final_hidden_states(teacher, inputs)
        teacher_head = causal_lm(teacher).get_output_embeddings()
        if after_teacher is not None:
            after_teacher(teacher_hidden, teacher_head)
    config = causal_lm(model).config.get_text_config()
    options = {
        "chunk": chunk_of(config.vocab_size if words is None else len(words.ids)),
        "softcap": getattr(config, "final_logit_softcapping", None),
    } | options
    losses: list[Losses] = []

    def loss(hidden: torch.Tensor, head: nn.Module) -> torch.Tensor:
        aims = (teacher_hidden, teacher_head, inputs["labels"])
        losses.append(chunked_losses(hidden, head, *aims, kl_weight=kl_weight, words=words, **options))
        return losses[0].loss

    passed = call_open(model, inputs, loss)
    return losses[0]._replace(loss=_with_value(passed, losses[0].loss))


def token_losses(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    softcap: float | None,
    words: Words | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(nll, kl) summed over tokens; logits are [tokens, vocabulary] as the heads leave them, targets [tokens].

    With `words` logits are [tokens, words]. A target that has no place among them counts for the kl alone.
    """
    logits = widened(logits, softcap)
    labels = targets if words is None else _places(targets, words)
    log_probs = log_softmax(logits, words)
    nll = F.nll_loss(log_probs, labels, reduction="sum", ignore_index=IGNORED)
    if teacher_logits is None:
        return nll, torch.zeros_like(nll)
    with torch.no_grad():
        teacher = log_softmax(widened(teacher_logits, softcap) / temperature, words)
    softened = log_probs if temperature == 1 else log_softmax(logits / temperature, words)
    kl = F.kl_div(softened, teacher, reduction="none", log_target=True).sum(-1)
    return nll, (kl * (targets != IGNORED)).sum() * temperature**2


@torch.compiler.disable
def chunked_losses(
    student_hidden: torch.Tensor,
    student_head: nn.Module,
    teacher_hidden: torch.Tensor | None,
    teacher_head: nn.Module | None,
    labels: torch.Tensor,
    *,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int = 1024,
    words: Words | None = None,
    token_losses: Callable[..., tuple[torch.Tensor, torch.Tensor]] = token_losses,
) -> Losses:
    """Next-token loss and, with a teacher, temperature^2 * KL(teacher || student), `chunk` tokens at a time.

    Hidden states are [batch, seq, hidden] after the final norm, of any float dtype, and the two models' widths may
    differ; labels are [batch, seq], -100 where there is no loss, and are shifted by one here. `softcap` is Gemma's
    final_logit_softcapping; `token_losses` is this module's function of that name, or what torch.compile makes of it.
    The student's head is called once as a module, and all chunks inside that call, so hooks that gather weights run
    once; the teacher's is called once per chunk. With no token left the loss is a zero that can be differentiated.
    With `words` the heads are nn.Linear, and the teacher's is not called; nll is the mean of the targets that have a
    place among them, times all tokens.
    """
    hidden = student_hidden.flatten(0, 1)
    taught = None if teacher_hidden is None else teacher_hidden.flatten(0, 1)
    targets = F.pad(labels.to(hidden.device)[:, 1:], (0, 1), value=IGNORED).flatten()
    forward: Callable[..., torch.Tensor] = student_head.forward
    teach: Any = teacher_head if teacher_head is None or words is None else head_part(teacher_head, words)
    sums: list[torch.Tensor] = []

    def all_chunks(hidden: torch.Tensor) -> torch.Tensor:
        part = None if words is None else head_part(student_head, words)
        logits = forward if part is None else part
        rows = student_head.parameters() if part is None else [row for row in part if row is not None]
        trained = [row for row in rows if row.requires_grad]

        def chunk_losses(hidden: torch.Tensor, at: slice) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                teacher_logits = None if taught is None else teach(taught[at])
            return token_losses(logits(hidden), teacher_logits, targets[at], temperature, softcap, words)

        needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or bool(trained))
        sums.extend(_GradientInForward.apply(chunk_losses, kl_weight, chunk, needs_grad, hidden, *trained))
        return sums[0]

    passed = _call_once(student_head, all_chunks, hidden)
    tokens, nll = (targets != IGNORED).sum(), sums[1]
    if words is not None:
        nll = nll * tokens / (_places(targets, words) != IGNORED).sum().clamp(min=1)
    return Losses(_with_value(passed, sums[0]), nll, sums[2], tokens)


def _with_value(passed: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """The graph of `passed`, which a wrapper may have rounded to its output dtype, with the value of `exact`."""
    return passed.to(exact.dtype) + (exact - passed).detach()


def _call_once(module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """module(*args) with its hooks and with `function` for its forward."""
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        return module(*args)
    finally:
        set_forward(module, before)


def chunk_of(vocabulary: int) -> int:
    """The largest power of two of tokens with at most LOGITS_AT_ONCE logits: usual batches split into equal chunks."""
    return 1 << max((LOGITS_AT_ONCE // vocabulary).bit_length() - 1, 0)


def widened(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def log_softmax(logits: torch.Tensor, words: Words | None) -> torch.Tensor:
    return F.log_softmax(logits if words is None else logits + words.offsets, dim=-1)


def _places(targets: torch.Tensor, words: Words) -> torch.Tensor:
    """Where among the words the targets are; IGNORED where there is none, and for those of no place."""
    return words.places[targets.clamp(min=0)].where(targets != IGNORED, IGNORED)


class _GradientInForward(torch.autograd.Function):
    """(loss, nll, kl) summed over chunks of `hidden` [tokens, width]; the gradients for it and `weights` are ready."""

    @staticmethod
    def forward(
        ctx: Any,
        chunk_losses: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        kl_weight: float,
        chunk: int,
        needs_grad: bool,
        hidden: torch.Tensor,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        wide = functools.partial(torch.promote_types, torch.float32)  # sums over chunks are never of half precision
        sums = torch.zeros(3, device=hidden.device, dtype=wide(hidden.dtype))
        hidden_grad = torch.empty_like(hidden)
        weight_grads = [torch.zeros_like(weight, dtype=wide(weight.dtype)) for weight in weights if needs_grad]
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            with torch.set_grad_enabled(needs_grad):
                leaf = hidden[part].detach().requires_grad_(needs_grad)
                nll, kl = chunk_losses(leaf, part)
                loss = (1 - kl_weight) * nll + kl_weight * kl
            sums += torch.stack([loss, nll, kl]).detach()
            if needs_grad:
                hidden_grad[part], *grads = torch.autograd.grad(loss, [leaf, *weights])
                for total, grad in zip(weight_grads, grads, strict=True):
                    total += grad
        if needs_grad:
            ctx.save_for_backward(hidden_grad, *(g.to(w.dtype) for g, w in zip(weight_grads, weights, strict=True)))
        loss, nll, kl = sums.unbind()
        ctx.mark_non_differentiable(nll, kl)
        return loss, nll, kl

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        hidden_grad, *weight_grads = ctx.saved_tensors
        return None, None, None, None, *(grad_loss.to(grad.dtype) * grad for grad in (hidden_grad, *weight_grads))
