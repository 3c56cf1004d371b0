"""A model's own answers as a file of text: what a refit is calibrated on and a distillation trains on.

What a chat model says after its own template is a mixture like that of the text it was tuned on, which is seldom
public (Liu et al., LLM-QAT, arXiv 2305.17888). Each row is a prompt and its answer, with all special tokens, so that
the tokenizer reads from the two, one by one, what the model read and wrote:

    {"prompt": "<|im_start|>user\\n...", "completion": "...<|im_end|>", "tokens": 131, "finished": true, "id": "5f..."}

`tokens` counts the answer's. `finished` is false where it was cut at `new`. Rows are added as they are done. `id` is
of the prompt, so that a run that was killed goes on with those that are missing (answer_file.py).

    write_answers(model, tokenizer, texts, "answers.jsonl", new=512, temperature=0.8)

Without prompts, their beginnings will do: the model writes them on first (finishing.py).

    write_answers(model, tokenizer, ["Explain how"], "answers.jsonl", finish=Finishing(times=1000))
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stocha_hf.answers.answer_file import AnswerFile, draw_key, row_id
from stocha_hf.answers.batches import continue_prompts
from stocha_hf.answers.choosing import Choice
from stocha_hf.answers.finishing import Beginnings, Finishing, RequestFile
from stocha_hf.answers.prompts import Prompt, end_tokens, rendered
from stocha_hf.answers.room import fitting_prompts, rows_at_once
from stocha_hf.checkpoints.paths import local_path
from stocha_hf.errors import StochaError
from stocha_hf.progress import Progress


@dataclass(frozen=True)
class Written:
    """What a call of `write_answers` did: `answers` are in the file, `new` of them are from this call.

    `new_tokens` counts the tokens that were written for them, and for equal ones that were not kept. `finished` is the
    share of all that ended by themselves. `too_long` counts prompts that leave the model no positions for an answer,
    and have none. Where the model finished the prompts, `requests` of them are different ones, and `unfinished` did
    not end.
    """

    path: str
    answers: int
    new: int
    new_tokens: int
    finished: float
    too_long: int
    tokens_per_second: float
    requests: int | None = None
    unfinished: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures under the names of their fields."""
        return asdict(self)


def write_answers(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Prompt],
    path: str | Path,
    *,
    new: int = 512,
    samples: int = 1,
    temperature: float = 0.8,
    top_p: float = 1.0,
    batch_size: int | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    finish: Finishing | None = None,
) -> Written:
    """Let a model answer prompts, into a file that training and refits read.

    Args:
        model: A CausalLM in eval mode.
        tokenizer: Its tokenizer.
        texts: What comes before an answer, with the chat template and special tokens in it, as `rendered` makes them.
            With `finish`, beginnings of prompts, texts or messages, without the template.
        path: A .jsonl or .parquet file. Answers that it has are kept.
        new: Tokens of an answer at most.
        samples: Answers to each prompt; equal ones are written once. A file can get more later.
        temperature: That tokens are drawn at; 0 takes the most likely one.
        top_p: Draw from the most likely tokens only, whose probabilities add up to this.
        batch_size: Answers in work at a time; None takes as many as the device's memory holds, at most ROWS.
        seed: Decides what is drawn, together with the prompt and the number of its sample. `batch_size` changes no
            more of it than how the model's numbers are rounded.
        settings: What else decides the answers, such as the weights' hash; kept beside the file.
        finish: How the model writes beginnings of prompts on before it answers them. The prompts are kept beside the
            file too, in one named .requests.

    Returns:
        How many there are, and how fast they came.

    Raises:
        StochaError: the file cannot be written or holds answers made otherwise, no prompt leaves the model room for an
            answer, or its logits are not finite.
    """
    path = local_path(path)
    drawn: dict[str, Any] = {"top_p": top_p, "batch_size": batch_size, "seed": seed}
    common = {"top_p": top_p, "seed": seed} | dict(settings or {})  # of requests and answers
    made = {"new": new, "temperature": temperature} | common
    ends, too_long, unfinished = end_tokens(model, tokenizer), 0, None
    if finish is None:
        whole = list(dict.fromkeys(text for text in texts if isinstance(text, str)))
        if any(not isinstance(text, str) for text in texts):
            raise StochaError("a prompt is a list of messages: expected text, as `rendered` makes it")
        fitting = fitting_prompts(model, tokenizer, whole, new)
        file = AnswerFile(path, made)
    else:
        beginnings = Beginnings(model, tokenizer, texts, finish, new)
        requests = RequestFile(path.with_name(path.name + ".requests"), finish.made() | common)
        file = AnswerFile(path, made)
        with requests:
            beginnings.write(requests, **drawn)
        prompts, unfinished = beginnings.ended(requests)
        whole, too_long = rendered(tokenizer, prompts, chat=True), beginnings.too_long
        fitting = fitting_prompts(model, tokenizer, whole, new)
    before = len(file.finished)
    with file:
        wanted = [(text, sample) for text in fitting for sample in range(samples)]
        missing = [(text, sample) for text, sample in wanted if row_id(text, sample) not in file.ids]
        found = continue_prompts(
            model,
            [fitting[text] for text, _ in missing],
            new=new,
            ends=ends,
            rows=batch_size or rows_at_once(model, max(map(len, fitting.values()), default=0) + new),
            choice=Choice(temperature, top_p),
            keys=[draw_key(text, f"{seed} {sample}") for text, sample in missing],
        )
        begun, tokens, bos = time.monotonic(), 0, _own_bos(tokenizer)
        with Progress(total=len(missing), desc="Answering", unit="answer") as bar:
            for i, answer in found:
                text, sample = missing[i]
                pair = {
                    "prompt": text.removeprefix(bos),
                    "completion": tokenizer.decode(answer, skip_special_tokens=False),
                }
                about = {"tokens": len(answer), "finished": answer[-1] in ends, "id": row_id(text, sample)}
                file.add(pair | about)
                tokens += len(answer)
                bar.set_postfix_str(f"{tokens / (time.monotonic() - begun):,.0f} tokens/s", refresh=False)
                bar.update()
        seconds = time.monotonic() - begun
    return Written(
        str(path),
        answers=len(file.finished),
        new=len(file.finished) - before,
        new_tokens=tokens,
        finished=sum(file.finished) / len(file.finished) if file.finished else 0.0,
        too_long=too_long + len(whole) - len(fitting),
        tokens_per_second=tokens / max(seconds, 1e-9),
        requests=None if finish is None else len(whole),
        unfinished=unfinished,
    )


def _own_bos(tokenizer: Any) -> str:
    """The BOS that the tokenizer puts before a text itself, when it reads the text again; empty if it puts none."""
    bos = tokenizer.bos_token
    return bos if bos and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
