"""A model of this package as lm-evaluation-harness asks one: likelihoods of continuations, and generated text.

The harness has a class of its own for models of transformers (HFLM). This one is for models that are loaded already,
and it has what a long evaluation needs beside: rows without padding when generating, likelihoods that are read where
they are wanted and nowhere else (likelihoods.py), responses kept as they come.

    lm = HarnessModel(model, tokenizer, Kept(Path("results.jsonl")), "smollm2-sparse")
    lm_eval.evaluator.evaluate(lm, ...)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from itertools import chain
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from stocha_hf.answers.batches import STRIDE, continue_prompts
from stocha_hf.answers.choosing import Choice
from stocha_hf.answers.prompts import end_tokens
from stocha_hf.cuts_stocha import cut_projections
from stocha_hf.decoding.rounds import Counts
from stocha_hf.errors import StochaError
from stocha_hf.measurement.fallback import fallback_of, read_of_texts, with_repeated
from stocha_hf.progress import Progress
from stocha_hf.tasks.drafted import draft_answers, with_drafts
from stocha_hf.tasks.kept import Kept
from stocha_hf.tasks.likelihoods import Likelihood, Pair, likelihoods
from stocha_hf.tasks.records import TaskReading

ROWS = {"cuda": 256, "cpu": 8}  # texts that are generated at a time; on a CPU as many as the sparse kernels take
NEW = 256  # tokens of an answer at most where a task does not say
TEXTS = 32  # answers to count bytes on, evenly spaced
TAIL = 24  # last tokens in which a text to stop at is looked for


class HarnessModel(TemplateLM):
    """Args: a CausalLM in eval mode; its tokenizer; where responses are kept, and under which name of the model;
    rows of a batch, or None for as many as are usual for the device; whether answers are written losslessly, one at
    a time.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        kept: Kept,
        name: str,
        batch_size: int | None = None,
        lossless: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.kept, self.name, self.batch_size = model, tokenizer, kept, name, batch_size
        self.lossless = lossless
        self._device = model.device
        self.generated: list[Any] = []  # requests for text since `reading`
        self.max_length = getattr(model.config, "max_position_embeddings", 2048)
        self.ends = end_tokens(model, tokenizer)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a chat as text; without `add_generation_prompt` its last message is the beginning of an answer."""
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        messages = chat_history if add_generation_prompt else chat_history[:-1]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + begun

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return token ids, with what the tokenizer puts before a text unless the text has it already."""
        if add_special_tokens is None:
            add_special_tokens = not (self.tokenizer.bos_token and string.startswith(self.tokenizer.bos_token))
        return self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]

    # Requests

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        missing = self._missing(requests)
        with Progress(total=len(missing), desc=_title(missing), unit="choice") as bar:
            for batch in self._likelihoods(self._encoded(missing)):
                self.kept.add((self._key(missing[i]), _about(missing[i]), response) for i, response in batch)
                bar.update(len(batch))
        return [tuple(self.kept.found[self._key(request)]) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        missing, pieces, owners = self._missing(requests), [], []
        for request in missing:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for window in map(make_disjoint_window, windows):
                pieces.append(window)
                owners.append(request)
        sums: dict[str, float] = defaultdict(float)
        for i, (likelihood, _) in chain.from_iterable(self._likelihoods(pieces)):
            sums[self._key(owners[i])] += likelihood
        self.kept.add((self._key(request), _about(request), sums[self._key(request)]) for request in missing)
        return [self.kept.found[self._key(request)] for request in requests]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self.generated += requests
        groups = defaultdict(list)  # requests that are generated in the same way
        for request in self._missing(requests):
            groups[repr(sorted(request.args[1].items()))].append(request)
        for group in groups.values():
            self._generate(group, dict(group[0].args[1]))
        return [self.kept.found[self._key(request)] for request in requests]

    def _generate(self, requests: list[Any], options: dict[str, Any]) -> None:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else [text for text in until if text]
        new = min(int(options.get("max_gen_toks", NEW)), self.max_length // 2)
        temperature = float(options.get("temperature") or 0) if options.get("do_sample") else 0.0
        prompts = [self.tok_encode(request.args[0])[-(self.max_length - new) :] for request in requests]

        def stop(tokens: list[int]) -> bool:
            tail = self.tokenizer.decode(tokens[-TAIL - STRIDE :])
            return any(text in tail for text in until)

        choice = Choice(temperature, float(options.get("top_p", 1.0)))
        write = self._drafted if self.lossless else self._continued
        answers = write(prompts, new, choice, stop if until else None)
        for i, tokens, about in Progress(answers, _title(requests), len(requests), unit="answer"):
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            text = text[: min((at for at in map(text.find, until) if at >= 0), default=len(text))]
            self.kept.add([(self._key(requests[i]), _about(requests[i]) | about, text)])

    def _continued(
        self, prompts: list[list[int]], new: int, choice: Choice, stop: Callable[[list[int]], bool] | None
    ) -> Iterator[tuple[int, list[int], dict[str, int]]]:
        """The number of a prompt, its answer's tokens, and its steps: batches of rows."""
        repeated: dict[int, int] = {}
        given: dict[str, Any] = {"rows": self.batch_size or ROWS[self.device.type], "repeated": repeated}
        if stop is not None:
            given["stop"] = lambda _, tokens: stop(tokens)
        for i, tokens in continue_prompts(self.model, prompts, new=new, ends=self.ends, choice=choice, **given):
            yield i, tokens, {"steps": len(tokens), "repeated": repeated[i]}

    def _drafted(
        self, prompts: list[list[int]], new: int, choice: Choice, stop: Callable[[list[int]], bool] | None
    ) -> Iterator[tuple[int, list[int], dict[str, int]]]:
        """The same, written losslessly, with what that took."""
        if choice.temperature:
            raise StochaError(
                f"the task samples its answers at the temperature {choice.temperature:g}: expected one whose answers "
                "are the most likely tokens, as lossless decoding writes no other"
            )
        for i, tokens, counts in draft_answers(self.model, prompts, new=new, ends=self.ends, stop=stop):
            yield i, tokens, {"steps": len(tokens) - 1} | asdict(counts)

    def reading(self, task: str) -> TaskReading | None:
        """What steps read that wrote the answers to a task, whose requests are those since this was asked last.

        None for a model that neither cuts inputs nor writes from drafts, a task without such answers, and answers
        whose steps nobody counted. Steps are counted up to each answer's end; bytes on TEXTS of the answers, with
        their prompts and read at once.
        """
        requests, self.generated = self.generated, []
        about = [self.kept.about[self._key(request)] for request in requests]
        counted = self.lossless or cut_projections(self.model)
        if not requests or not counted or not all("steps" in row for row in about):
            return None
        steps = sum(row["steps"] for row in about)
        texts = [self._text(request) for request in requests[:: -(-len(requests) // TEXTS)]]
        read, fallback = read_of_texts(self.model, texts), None
        if self.lossless:
            counts = Counts(*(sum(row.get(key.name, 0) for row in about) for key in fields(Counts)))
            read, drafts = with_drafts(read, steps, counts)
            return TaskReading(task, steps, len(texts), read, drafts=drafts)
        if fallback_of(self.model):
            repeated = sum(row["repeated"] for row in about)
            read, fallback = with_repeated(self.model, read, steps, repeated)
        return TaskReading(task, steps, len(texts), read, fallback)

    def _text(self, request: Any) -> tuple[list[int], int]:
        """A prompt with its answer, as token ids, and how many of them are the prompt's."""
        prompt = self.tok_encode(request.args[0])[-(self.max_length // 2) :]
        answer = self.tok_encode(self.kept.found[self._key(request)], add_special_tokens=False)
        return [*prompt, *answer][: self.max_length], len(prompt)

    def _encoded(self, requests: list[Any]) -> list[Pair]:
        """Context and continuation of each, as the harness divides their tokens."""
        found = []
        for context, continuation in (request.args for request in requests):
            if context:
                found.append(self._encode_pair(context, continuation))
            else:
                found.append(([self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)))
        return found

    def _likelihoods(self, pairs: Sequence[Pair]) -> Iterator[list[tuple[int, Likelihood]]]:
        return likelihoods(self.model, pairs, longest=self.max_length, rows=self.batch_size)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """The harness's own way in, for those who call it: [((context, continuation), ids, ids)]."""
        found = dict(chain.from_iterable(self._likelihoods([(context, after) for _, context, after in requests])))
        return [found[i] for i in range(len(requests))]

    def _missing(self, requests: list[Any]) -> list[Any]:
        """The requests that have no response yet, each once."""
        missing = {key: request for request in requests if (key := self._key(request)) not in self.kept.found}
        return list(missing.values())

    def _key(self, request: Any) -> str:
        drafted = self.lossless and request.request_type == "generate_until"  # likelihoods are the same either way
        return self.kept.key(self.name + " lossless" * drafted, request.request_type, request.args)


def _about(request: Any) -> dict[str, Any]:
    return {"task": request.task_name}


def _title(requests: list[Any]) -> str:
    return ", ".join(sorted({str(request.task_name) for request in requests}))[:40]
