"""Several samples of a prompt, and how likely and how diverse they are, by the noise that makes them differ.

StochA's second use (Lomeli et al., arXiv 2509.22358): the most likely token is taken at every step, and the activation
alone is random, as an alternative to sampling tokens at a temperature.

    samples = generate(model, prompt, samples=8, new=40, p=0.9)            # noise of the activation
    samples = generate(model, prompt, samples=8, new=40, temperature=0.7)  # noise of the choice of tokens
    log_likelihoods(model, prompt, samples)                                # of the model without noise

The rows of a batch are one prompt's samples: no row is padded, and as a row is read from the prompt on with noise of
its own, its cache is what it computed itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from stocha_hf.measurement.diversity import distinct, self_bleu

ROWS = 8  # samples whose logits are in memory at a time
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
    """`samples` continuations of the token ids `prompt`: at most `new` tokens each, the last may be an end-of-text.

    With `p` the activation is StochA, forced for this call, also while the prompt is read. With `temperature` tokens
    are drawn from softmax(logits / temperature), whatever the model's generation config says; without it the most
    likely one is taken. With neither all samples are equal. `seed` decides all noise: the same bits on the same device
    and threads, and the generators are left as they were. Raises ValueError as stocha_mode does.
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
            **choice,
        )
    ends = model.generation_config.eos_token_id
    return [_up_to_end(row, ends if isinstance(ends, list) else [ends]) for row in rows[:, len(prompt) :].tolist()]


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
    """The mean log-probability of each sample's tokens after the prompt, in nats a token, of the model as it is.

    Samples have at least one token each. Shorter ones are padded on the right: what comes later changes nothing in a
    causal model, so that neither a mask nor shifted positions are needed.
    """
    longest = max(map(len, samples))
    padded = [[*sample, *[IGNORED] * (longest - len(sample))] for sample in samples]
    found: list[float] = []
    for after in torch.tensor(padded, device=model.device).split(ROWS):
        before = torch.tensor([list(prompt)] * len(after), device=model.device)
        rows = torch.cat([before, after.clamp(min=0)], dim=1)
        logits = model(rows, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), after, reduction="none", ignore_index=IGNORED)
        found += (-losses.sum(1) / (after != IGNORED).sum(1)).tolist()
    return found


def measure(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    doing: str = "Generating",
    **options: Any,
) -> dict[str, Any]:
    """Samples of each prompt and their figures; `options` are those of `generate`. Prompt i has the seed `seed` + i.

    `log_likelihood` is the mean over all samples, `distinct_1` to `distinct_3` and `self_bleu` (None for one sample a
    prompt) are means over prompts; `samples` has a list of {"text", "tokens", "log_likelihood"} for each prompt.
    """
    rows, told = [], []
    for i, prompt in enumerate(tqdm(prompts, desc=doing, unit="prompt", disable=None, leave=False)):
        samples = generate(model, prompt, seed=seed + i, **options)
        likelihoods = log_likelihoods(model, prompt, samples)
        texts = tokenizer.batch_decode(samples, skip_special_tokens=True)
        row = {"log_likelihood": _mean(likelihoods)} | {f"distinct_{n}": distinct(samples, n) for n in (1, 2, 3)}
        rows.append(row | ({"self_bleu": self_bleu(texts)} if len(texts) > 1 else {}))
        told.append(
            [
                {"text": text, "tokens": len(sample), "log_likelihood": likelihood}
                for text, sample, likelihood in zip(texts, samples, likelihoods, strict=True)
            ]
        )
    figures = {name: _mean([row[name] for row in rows]) for name in rows[0]}
    return {"self_bleu": None, **figures, "samples": told}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
