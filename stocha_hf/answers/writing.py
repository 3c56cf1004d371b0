"""A model's own answers as a file of text: what a refit is calibrated on and a distillation trains on.

What a chat model says after its own template is a mixture like that of the text it was tuned on, which is seldom
public (Liu et al., LLM-QAT, arXiv 2305.17888). Each row is one text, with all special tokens, so that the tokenizer
reads from it what the model read and wrote:

    {"text": "<|im_start|>user\\n...<|im_end|>\\n", "tokens": 131, "finished": true, "id": "5f0c..."}

`tokens` counts the answer's. `finished` is false where it was cut at `new`. Rows are added as they are done. `id` is
of the prompt, so that a run that was killed goes on with those that are missing (answer_file.py).

    write_answers(model, tokenizer, texts, "answers.jsonl", new=512, temperature=0.8)
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from stocha_hf.answers.answer_file import AnswerFile
from stocha_hf.answers.batches import continue_prompts
from stocha_hf.answers.choosing import Choice
from stocha_hf.answers.prompts import end_tokens, token_ids
from stocha_hf.checkpoints.paths import local_path
from stocha_hf.errors import StochaError
from stocha_hf.progress import Progress

ROWS = {"cuda": 2048, "cpu": 8}  # answers in work at most: more keep a GPU busy, a CPU's sparse kernels take so many
FILLED = 0.6  # of a GPU's free memory, by answers in work


@dataclass(frozen=True)
class Written:
    """What a call of `write_answers` did: `answers` are in the file, `new` of them are from this call.

    `new_tokens` counts the new answers' tokens, `finished` is the share of all that ended by themselves. `too_long`
    counts prompts that leave the model no positions for an answer, and have none.
    """

    path: str
    answers: int
    new: int
    new_tokens: int
    finished: float
    too_long: int
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Return the figures under the names of their fields."""
        return asdict(self)


def write_answers(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    path: str | Path,
    *,
    new: int = 512,
    samples: int = 1,
    temperature: float = 0.8,
    top_p: float = 1.0,
    batch_size: int | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> Written:
    """Let a model answer prompts, into a file that training and refits read.

    Args:
        model: A CausalLM in eval mode.
        tokenizer: Its tokenizer.
        texts: What comes before an answer, with the chat template and special tokens in it, as `rendered` makes them.
        path: A .jsonl or .parquet file. Answers that it has are kept.
        new: Tokens of an answer at most.
        samples: Answers to each prompt; equal ones are written once.
        temperature: That tokens are drawn at; 0 takes the most likely one.
        top_p: Draw from the most likely tokens only, whose probabilities add up to this.
        batch_size: Answers in work at a time; None takes as many as the device's memory holds, at most ROWS.
        seed: Decides what is drawn, together with the prompt and the number of its sample. `batch_size` changes no
            more of it than how the model's numbers are rounded.
        settings: What else decides the answers, such as the weights' hash; kept beside the file.

    Returns:
        How many there are, and how fast they came.

    Raises:
        StochaError: the file cannot be written or holds answers made otherwise, no prompt leaves the model room for an
            answer, or its logits are not finite.
    """
    path = local_path(path)
    made = {"new": new, "samples": samples, "temperature": temperature, "top_p": top_p} | dict(settings or {})
    fitting, ends = _fitting(model, tokenizer, texts, new), end_tokens(model, tokenizer)
    with AnswerFile(path, made) as file:
        wanted = [(text, sample) for text in fitting for sample in range(samples)]
        missing = [(text, sample) for text, sample in wanted if _id(text, sample) not in file.ids]
        found = continue_prompts(
            model,
            [fitting[text] for text, _ in missing],
            new=new,
            ends=ends,
            rows=batch_size or rows_at_once(model, max(map(len, fitting.values()), default=0) + new),
            choice=Choice(temperature, top_p),
            keys=[int(_id(text, f"{seed} {sample}")[:16], 16) for text, sample in missing],
        )
        begun, tokens, answered = time.monotonic(), 0, 0
        with Progress(total=len(missing), desc="Answering", unit="answer") as bar:
            for i, answer in found:
                text, sample = missing[i]
                whole = _without_bos(tokenizer, text) + tokenizer.decode(answer, skip_special_tokens=False)
                about = {"tokens": len(answer), "finished": answer[-1] in ends, "id": _id(text, sample)}
                file.add({"text": whole} | about)
                answered, tokens = answered + 1, tokens + len(answer)
                bar.set_postfix_str(f"{tokens / (time.monotonic() - begun):,.0f} tokens/s", refresh=False)
                bar.update()
        seconds = time.monotonic() - begun
    return Written(
        str(path),
        answers=len(file.finished),
        new=answered,
        new_tokens=tokens,
        finished=sum(file.finished) / len(file.finished) if file.finished else 0.0,
        too_long=len(set(texts)) - len(fitting),
        tokens_per_second=tokens / max(seconds, 1e-9),
    )


def rows_at_once(model: Any, tokens: int) -> int:
    """How many texts of so many tokens fit: their keys and values, and a step's logits and probabilities."""
    if model.device.type != "cuda":
        return ROWS[model.device.type]
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * size * model.dtype.itemsize
    free = torch.cuda.mem_get_info(model.device)[0]
    return min(max(int(FILLED * free / (tokens * cache + 16 * config.vocab_size)), 1), ROWS["cuda"])


def _fitting(model: Any, tokenizer: Any, texts: Sequence[str], new: int) -> dict[str, list[int]]:
    """The texts that leave the model positions for an answer, with their token ids."""
    most = getattr(model.config, "max_position_embeddings", None) or float("inf")
    found = dict(zip(texts, token_ids(tokenizer, texts), strict=True))
    fitting = {text: ids for text, ids in found.items() if len(ids) + new <= most}
    if not fitting:
        raise StochaError(
            f"the shortest prompt has {min(map(len, found.values()))} tokens, and an answer may have {new}: expected "
            f"at most {most:g} together, which the model has positions for; give a smaller --new"
        )
    return fitting


def _without_bos(tokenizer: Any, text: str) -> str:
    """The text without a BOS that the tokenizer puts there itself when it reads the text again."""
    bos = tokenizer.bos_token
    puts_bos = bool(bos) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if puts_bos else text


def _id(text: str, sample: int | str) -> str:
    return hashlib.sha1(f"{sample} {text}".encode()).hexdigest()
