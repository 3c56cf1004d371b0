"""Several samples of a prompt, and how likely and how diverse they are, by the noise that makes them differ.

StochA's second use (Lomeli et al., arXiv 2509.22358): the most likely token is taken at every step, and the activation
alone is random, as an alternative to sampling tokens at a temperature.

    samples = generate(model, prompt, samples=8, new=40, p=0.9)            # noise of the activation
    samples = generate(model, prompt, samples=8, new=40, temperature=0.7)  # noise of the choice of tokens
    log_likelihoods(model, prompt, samples)                                # of the model without noise
    sample(model, tokenizer, ["Once upon"], samples=8, new=40, p=0.9)      # all that, and how diverse they are

The rows of a batch are one prompt's samples: no row is padded, and as a row is read from the prompt on with noise of
its own, its cache is what it computed itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import functional as F

from stocha_hf.errors import StochaError
from stocha_hf.measurement.diversity import distinct, self_bleu
from stocha_hf.measurement.fallback import predictions
from stocha_hf.measurement.records import SampledText, Samples
from stocha_hf.models import cutting_everywhere
from stocha_hf.progress import Progress

LOGIT_ROWS = 8  # samples whose logits are in memory at a time
IGNORED = -100  # cross_entropy's default


def generate(
    model: Any,
    prompt: Sequence[int],
    *,
    samples: int,
    new: int,
    p: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Continue a prompt several times.

    Args:
        model: A patched CausalLM.
        prompt: Token ids, at least one.
        samples: How many continuations.
        new: Tokens of each at most; the last may be an end of text.
        p: Force StochA with this probability for this call, also while the prompt is read.
        temperature: Draw tokens from softmax(logits / temperature), whatever the model's generation config says.
            Without it the most likely token is taken; without both, all samples are equal.
        seed: Decides all noise: the same bits on the same device and threads. The generators are left as they were.

    Returns:
        The token ids of each sample, without the prompt's.

    Raises:
        ValueError: `p` is not a probability, as `stocha_mode` says.
        StochaError: the model's logits are NaN or infinite.
    """
    prompts = torch.tensor([list(prompt)] * samples, device=model.device)
    choice: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with _seeded(seed, model.device), nullcontext() if p is None else model.stocha_mode("stocha", p):
        rows = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            use_cache=True,  # trainers leave it off in configs; without it each step would draw the past's noise anew
            repetition_penalty=1.0,
            pad_token_id=0,  # cut off below
            logits_processor=[_check_logits],
            **choice,
        )
    ends = model.generation_config.eos_token_id
    return [_up_to_end(row, ends if isinstance(ends, list) else [ends]) for row in rows[:, len(prompt) :].tolist()]


def _check_logits(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """A logits processor: refuse what no token can be chosen from, which is a crash on a GPU."""
    if logits.isnan().any() or logits.isposinf().any():
        raise StochaError(
            "the model's logits are NaN or infinite: expected whole weights, in a dtype that their numbers fit; try "
            "--dtype float32, or convert or train it again"
        )
    return logits


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _up_to_end(tokens: list[int], ends: list[int]) -> list[int]:
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]


@torch.no_grad()
def log_likelihoods(model: Any, prompt: Sequence[int], samples: Sequence[Sequence[int]]) -> list[float]:
    """Return the mean log-probability, in nats, of each sample's tokens after the prompt, of the model as it is.

    Shorter samples are padded on the right: what comes later changes nothing in a causal model, so that neither a mask
    nor shifted positions are needed.

    Args:
        model: A CausalLM.
        prompt: Token ids, at least one.
        samples: Token ids of each sample, at least one each.
    """
    longest = max(map(len, samples))
    padded = [[*sample, *[IGNORED] * (longest - len(sample))] for sample in samples]
    found: list[float] = []
    for after in torch.tensor(padded, device=model.device).split(LOGIT_ROWS):
        before = torch.tensor([list(prompt)] * len(after), device=model.device)
        rows = torch.cat([before, after.clamp(min=0)], dim=1)
        real = torch.cat([torch.ones_like(before, dtype=torch.bool), after != IGNORED], dim=1)
        with cutting_everywhere(model):
            logits = predictions(model, rows, longest + 1, real)[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), after, reduction="none", ignore_index=IGNORED)
        found += (-losses.sum(1) / (after != IGNORED).sum(1)).tolist()
    return found


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    *,
    samples: int,
    new: int,
    p: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
    doing: str = "Generating",
) -> Samples:
    """Continue each prompt several times, and measure how likely and how diverse the samples are.

    Args:
        model: A patched CausalLM.
        tokenizer: Its tokenizer.
        prompts: Texts, or token ids of each.
        samples: Continuations of each prompt.
        new: Tokens of each at most.
        p: Force StochA with this probability, as in `generate`.
        temperature: Draw tokens at this temperature, as in `generate`.
        seed: Of the first prompt; prompt i has `seed` + i.
        doing: What a progress bar says.

    Returns:
        The samples, their mean log-likelihood a token, distinct n-grams and self-BLEU.

    Raises:
        ValueError: `p` is not a probability.
        StochaError: a prompt is empty, the logits are NaN or infinite, or sacrebleu is missing.
    """
    rows, found = [], []
    for i, prompt in enumerate(Progress(prompts, desc=doing, unit="prompt")):
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        _check_prompt(ids, prompt, model.config.vocab_size)
        some = generate(model, ids, samples=samples, new=new, p=p, temperature=temperature, seed=seed + i)
        likelihoods = log_likelihoods(model, ids, some)
        texts = tokenizer.batch_decode(some, skip_special_tokens=True)
        row = {"log_likelihood": _mean(likelihoods)} | {f"distinct_{n}": distinct(some, n) for n in (1, 2, 3)}
        rows.append(row | ({"self_bleu": self_bleu(texts)} if len(texts) > 1 else {}))
        found.append([SampledText(*one) for one in zip(texts, map(len, some), likelihoods, strict=True)])
    figures: dict[str, Any] = {name: _mean([row[name] for row in rows]) for name in rows[0]}
    return Samples(**({"self_bleu": None} | figures), samples=found)


def _check_prompt(ids: Sequence[int], prompt: str | Sequence[int], vocabulary: int) -> None:
    if not ids:
        raise StochaError(f"the prompt {prompt!r} has no tokens: expected some text")
    if max(ids) >= vocabulary:
        raise StochaError(
            f"the prompt has the token {max(ids)}, but the model only {vocabulary} tokens: expected the tokenizer "
            "that the model was trained with"
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
